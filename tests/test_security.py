"""What docs/security.md promises: which loaders exist, whose checkpoints are read, and where no secret may turn up."""

import ast
import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_fec.config import ConfigError, ModelConfig, load_config
from megatron_fec.evaluation_config import load_evaluation
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.preflight import load_tokenizer
from megatron_fec.security import check_checkpoint, refuse_secrets, secrets_of, without_secrets
from megatron_fec.tasks.arithmetic import VOCABULARY
from megatron_fec.tasks.prompts import load_prompts

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path for top in ("megatron_fec", "launch", "benchmarks") for path in (ROOT / top).rglob("*.py")
)

# ------------------------------------------------------------------ loaders

# Calls that can run what they read, or that bring in files from elsewhere; json reads data and nothing else.
LOADER = re.compile(
    r"(^|\.)(load|loads|load_dataset|from_pretrained|snapshot_download|hf_hub_download|load_state_dict_from_url"
    r"|load_inline|read_pickle|unsafe_load|full_load|load_all|(all_)?gather_object|(broadcast|scatter|send|recv)_object_list)$|^(eval|exec|compile|__import__)$"
)
HARMLESS = ("json.load", "json.loads", "tl.load")
# Pickle between the ranks of one job, whose network is trusted.
BETWEEN_RANKS = tuple(
    f"dist.{name}" for name in ("all_gather_object", "gather_object", "broadcast_object_list")
)
FORBIDDEN_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle")
ALLOWED = {  # (file, call) -> why it is safe
    ("megatron_fec/config.py", "OmegaConf.load"): "YAML by a safe loader",
    ("megatron_fec/report.py", "OmegaConf.load"): "YAML by a safe loader",
    ("megatron_fec/policy/model.py", "AutoConfig.from_pretrained"): "JSON; no code of the model",
    ("megatron_fec/rollout/vllm_engine.py", "AutoConfig.from_pretrained"): "JSON; no code of the model",
    ("megatron_fec/rollout/vllm_parts.py", "AutoConfig.from_pretrained"): "JSON; no code of the model",
    ("megatron_fec/preflight.py", "AutoTokenizer.from_pretrained"): "JSON and text; no code of the model",
    ("megatron_fec/hub.py", "snapshot_download"): "JSON, text and safetensors only",
    ("megatron_fec/tasks/prompts.py", "datasets.load_dataset"): "data files; scripts are refused",
    ("megatron_fec/policy/checkpoint.py", "torch.load"): "weights_only",
    ("megatron_fec/policy/checkpoint.py", "dist_checkpointing.load"): "pickle, after check_checkpoint",
    ("benchmarks/implementations.py", "load"): "a function of its own",
    ("megatron_fec/serving.py", "AutoTokenizer.from_pretrained"): "JSON and text; no code of the model",
    ("megatron_fec/engines.py", "AutoConfig.from_pretrained"): "JSON; no code of the model",
    ("megatron_fec/doctor_inputs.py", "snapshot_download"): "finds what is here already",
    ("megatron_fec/dry_run.py", "hf_hub_download"): "one file of JSON",
    ("megatron_fec/rollout/fleet.py", "client.load"): "sends weights",
    ("megatron_fec/rollout/server_engine.py", "fleet.load"): "sends weights",
    ("megatron_fec/policy/checkpoint_tensors.py", "import pickle"): "see pickle.load",
    (
        "megatron_fec/policy/checkpoint_tensors.py",
        "pickle.load",
    ): "from a fork of this process, in memory that both share",
}


def loaders(source: str) -> set[str]:
    """Calls of LOADER, and imports that only serve such calls."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if LOADER.search(name) and name not in HARMLESS + BETWEEN_RANKS:
                found.add(name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {f"import {name}" for name in modules if name.split(".")[0] in FORBIDDEN_IMPORTS}
    return found


def careless_settings(source: str) -> list[str]:
    """Calls that are on the list for a setting which they do not have."""
    needed = {"torch.load": "weights_only=True"} | dict.fromkeys(
        ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained"), "trust_remote_code=False"
    )
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = [f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords]
            rule = needed.get(ast.unparse(node.func))
            found += [f"{ast.unparse(node)} without {rule}"] if rule and rule not in given else []
            for word in given:
                if word.startswith(("trust_remote_code=", "allow_pickle=")) and not word.endswith("=False"):
                    found.append(word)
    return found


def test_every_loader_is_on_the_list() -> None:
    found = {(str(path.relative_to(ROOT)), name) for path in SOURCES for name in loaders(path.read_text())}
    assert found == set(ALLOWED)  # a new one needs a reason; one that is gone leaves the list


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_loaders_are_called_with_care(path: Path) -> None:
    assert careless_settings(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "from torch import load\nload(f)",
        "import pickle",
        "from pickle import loads as read",
        "np.load(f)",
        "eval(text)",
        "AutoModel.from_pretrained(f)",
        "yaml.unsafe_load(f)",
        "dist.scatter_object_list(a, b)",
    ],
)
def test_the_list_can_be_too_short(source: str) -> None:
    assert loaders(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "AutoConfig.from_pretrained(f)",
        "AutoTokenizer.from_pretrained(f, trust_remote_code=True)",
        "LLM(model=f, trust_remote_code=x)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_care_can_be_missing(source: str) -> None:
    assert careless_settings(source)


# ------------------------------------------------------------------ code that comes with models and data

PLANT = "from pathlib import Path\nPath({canary!r}).touch()\n"


def plant(folder: Path, name: str) -> Path:
    """A file of Python that gives itself away when it runs."""
    canary = folder.parent / "canary"
    (folder / name).write_text(PLANT.format(canary=str(canary)))
    return canary


def test_the_code_of_a_model_does_not_run(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    canary = plant(model, "evil.py")
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (model / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"holds no readable Hugging Face checkpoint.*custom code"):
        load_hf_config(str(model))
    assert not canary.exists()


def test_the_code_of_a_tokenizer_does_not_run(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_model(model, VOCABULARY, seed=0)
    canary = plant(model, "evil.py")
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]},
    }
    path.write_text(json.dumps(settings))
    load_tokenizer(ModelConfig(path=str(model)), model, load_hf_config(str(model)))
    assert not canary.exists()
    with pytest.raises(Exception, match="EvilTokenizer"):  # the trap works: with trust it is sprung
        AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    assert canary.exists()


def test_the_script_of_a_data_set_does_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    canary = plant(folder, "data.py")
    with pytest.raises(ConfigError, match=r"could not be loaded as .* scripts are no longer supported"):
        load_prompts(
            str(folder),
            tokenizer=None,  # type: ignore[arg-type]
            prompt_column="prompt",
            answer_column="answer",
            prompt_style="plain",
            max_prompt_tokens=9,
        )
    assert not canary.exists()


# ------------------------------------------------------------------ whose checkpoints are read


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    for name in (".metadata", "trainer_state.json"):
        (folder / name).write_text("{}")
    return folder


STRANGER = 54321


@pytest.mark.parametrize("name", ["", ".metadata", "..", "../.."])
def test_a_stranger_s_checkpoint_is_refused(checkpoint: Path, name: str) -> None:
    check_checkpoint(checkpoint)
    path = checkpoint / name
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1)
        user = 0
    else:  # only root gives files away: let everything be a stranger's
        path, user = checkpoint / "../..", os.geteuid() + 1
    place = re.escape(str(path.resolve()))
    with pytest.raises(
        ConfigError, match=rf"trainer.resume: {place} belongs to user \d+, not to you .{user}. or root"
    ):
        check_checkpoint(checkpoint, user=user)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_s_checkpoint_is_fine(checkpoint: Path) -> None:
    check_checkpoint(checkpoint, user=STRANGER)


@pytest.mark.parametrize("name", ["", ".metadata", "..", "../.."])
def test_a_checkpoint_that_everyone_may_write_is_refused(checkpoint: Path, name: str) -> None:
    path = (checkpoint / name).resolve()
    path.chmod(path.stat().st_mode | 0o020)  # the group may
    check_checkpoint(checkpoint)
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(
        ConfigError, match=rf"{re.escape(str(path))} can be written by every user.*chmod -R o-w"
    ):
        check_checkpoint(checkpoint)


def test_links_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("{}")
    (checkpoint / ".metadata").unlink()
    (checkpoint / ".metadata").symlink_to(elsewhere)
    check_checkpoint(checkpoint)
    elsewhere.chmod(0o666)
    with pytest.raises(ConfigError, match=rf"\.metadata, which is {elsewhere}, can be written by every user"):
        check_checkpoint(checkpoint)
    elsewhere.unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        check_checkpoint(checkpoint)


def test_a_folder_on_another_disk_may_be_linked(checkpoint: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    checkpoint.parent.rename(scratch)
    checkpoint.parent.symlink_to(scratch)
    check_checkpoint(checkpoint)
    scratch.chmod(0o777)
    with pytest.raises(ConfigError, match=f"which is {scratch}, can be written by every user"):
        check_checkpoint(checkpoint)
    scratch.chmod(0o1777)  # sticky, as the folder of temporary files: nobody replaces another's file
    check_checkpoint(checkpoint)


# ------------------------------------------------------------------ secrets in settings

URL = "https://user:geheim@example.org/rows.jsonl"


@pytest.mark.parametrize("key", ["data.train", "data.validation", "model.path", "trainer.run_dir"])
def test_a_password_in_a_url_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^{key} holds a URL with a user's name or password.*HF_TOKEN"
    ) as error:
        load_config(ROOT / "configs" / "tiny_cpu.yaml", [f"{key}={URL}"])
    assert "geheim" not in str(error.value)


def test_a_token_in_a_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds a URL"):
        load_config(ROOT / "configs" / "tiny_cpu.yaml", ["data.train=https://hf_geheim@example.org/rows"])


def test_an_evaluation_refuses_it_too() -> None:
    for key in ("model.path", "benchmarks.countdown.source"):
        with pytest.raises(ConfigError, match=f"{key} holds a URL"):
            load_evaluation(ROOT / "configs" / "evaluation_tiny.yaml", [f"{key}={URL}"])


def test_the_value_of_a_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_geheim_geheim")
    override = "data.train=https://example.org/${oc.env:HF_TOKEN}/rows"
    with pytest.raises(
        ConfigError, match=r"data\.train holds the value of the environment variable HF_TOKEN"
    ) as error:
        load_config(ROOT / "configs" / "tiny_cpu.yaml", [override])
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("FEC_KEY_FILE", "/etc/key"), ("FEC_TOKEN", "4"), ("KEYBOARD", "embedded:countdown")]
)
def test_what_is_no_secret_may_stand_in_settings(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    overrides = ["trainer.run_dir=/etc/key/run", "trainer.max_steps=4", "data.train=embedded:countdown"]
    load_config(ROOT / "configs" / "tiny_cpu.yaml", overrides)


@dataclass
class Nested:
    texts: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "settings", [Nested(texts=["a", URL]), Nested(options={"a": {"b": [URL]}}), Nested(options={URL: 1})]
)
def test_secrets_are_found_at_any_depth(settings: Nested) -> None:
    with pytest.raises(ConfigError, match="holds a URL"):
        refuse_secrets(settings)
    refuse_secrets(Nested(texts=["https://example.org/@name", "name@example.org", "a:b@c"]))


def test_which_variables_are_secrets() -> None:
    secret = "HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN DB_PASSWORD my_token FEC_KEY OPENAI_API_KEY"
    plain = "PATH HOME MONKEY KEYBOARD TOKENIZERS_PARALLELISM SLURM_JOB_ID OMP_NUM_THREADS RANK"
    environment = {str(name): "x" for name in f"{secret} {plain}".split()}
    assert sorted(secrets_of(environment)) == sorted(secret.split())
    assert sorted(without_secrets(environment)) == sorted(plain.split())


# ------------------------------------------------------------------ shell scripts


def test_lint_checks_every_shell_script() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    scripts = set()
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and (
            path.suffix in (".sh", ".bash", ".sbatch")
            or re.match(rb"#!.*\b(ba|da|k)?sh\b", path.read_bytes()[:80])
        ):
            scripts.add(name)
    assert {".ci/run", "launch/node_env.sh"} <= scripts
    listed = subprocess.run(
        ["make", "-s", "shell-scripts"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(listed.stdout.split()) == scripts
