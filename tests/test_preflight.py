"""What a user meets when the inputs of a run are wrong: each refused before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from preflight_fixtures import config_of, edit_json, fake_checkpoint, prepared
from ranks import run_on_ranks
from transformers import AutoConfig

from megatron_fec import hub, preflight
from megatron_fec.config import ConfigError, save_config
from megatron_fec.convert import convert
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.preflight import prepare_inputs
from megatron_fec.tasks.arithmetic import VOCABULARY, countdown_rows


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "model"
    save_tiny_model(folder, VOCABULARY, seed=0)
    return folder


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return shutil.copytree(pristine, tmp_path / "model")


# ------------------------------------------------------------------ what is right passes


def test_good_inputs_pass_and_nothing_is_left_behind(model: Path, tmp_path: Path):
    inputs = prepared(tmp_path, f"model.path={model}", "data.validation=embedded:countdown:validation")
    assert inputs.model_dir == model
    assert len(inputs.train.prompts) == len(countdown_rows("train"))
    assert inputs.validation is not None
    assert len(inputs.validation.prompts) == 256
    assert (inputs.checkpoint, inputs.state) == (None, None)
    assert list((tmp_path / "run").iterdir()) == []


def test_the_embedded_model_is_made_once(tmp_path: Path):
    first = prepared(tmp_path)
    weights = first.model_dir / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert first.model_dir == tmp_path / "run" / "model"
    assert prepared(tmp_path).model_dir == first.model_dir
    assert weights.stat().st_mtime_ns == stamp


def test_the_newest_checkpoint_is_resumed(model: Path, tmp_path: Path):
    older = fake_checkpoint(tmp_path / "run", model)
    newest = shutil.copytree(older, older.with_name("step_000012"))
    inputs = prepared(tmp_path, f"model.path={model}")
    assert inputs.checkpoint == newest
    assert inputs.state is not None
    assert inputs.state.consumed_samples == 36


# ------------------------------------------------------------------ the model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["policy.tensor_parallel=4"],
            r"policy\.tensor_parallel=4 must divide the checkpoint's num_attention_heads=2\. Use one of 1, 2\.",
        ),
        (
            ["policy.pipeline_parallel=3"],
            r"policy\.pipeline_parallel=3 exceeds the checkpoint's num_hidden_layers=2: a stage would have no layer\. Use",
        ),
        (
            ["rollout.max_response_tokens=1015", "policy.micro_batch_tokens=2000"],
            r"max_prompt_tokens=10 \+ rollout\.max_response_tokens=1015 = 1025 must not exceed the checkpoint's "
            r"max_position_embeddings=1024\. Lower one of them",
        ),
    ],
)
def test_a_model_that_does_not_fit(model: Path, tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, f"model.path={model}", *overrides)


def test_the_longest_sequence_that_fits_is_accepted(model: Path, tmp_path: Path):
    prepared(
        tmp_path, f"model.path={model}", "rollout.max_response_tokens=1014", "policy.micro_batch_tokens=2000"
    )


def test_a_folder_that_is_no_model(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model\.path=.*empty holds no readable Hugging Face checkpoint"):
        prepared(tmp_path, f"model.path={tmp_path / 'empty'}")


def test_a_path_that_does_not_exist(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.path=.*nowhere is neither a folder nor a hub name"):
        prepared(tmp_path, f"model.path={tmp_path / 'nowhere'}")


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network\nmore about it")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(
        ConfigError, match=r"model\.path=org/name is neither .* fetched: no network Give a folder"
    ) as error:
        prepared(tmp_path, "model.path=org/name")
    assert "\n" not in str(error.value)


def test_a_model_without_safetensors(model: Path, tmp_path: Path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"model\.path=.* holds no \*\.safetensors file\. Convert the checkpoint"
    ):
        prepared(tmp_path, f"model.path={model}")


def test_a_tokenizer_without_an_end(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load = preflight.AutoTokenizer.from_pretrained

    def without_end(path: Path, **options: Any) -> Any:
        tokenizer = load(path, **options)
        tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr(preflight.AutoTokenizer, "from_pretrained", without_end)
    with pytest.raises(
        ConfigError, match=r"model\.path=.*: the tokenizer has no eos_token, so no response would end"
    ):
        prepared(tmp_path, f"model.path={model}")


def test_a_model_without_a_tokenizer(model: Path, tmp_path: Path):
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"model\.path=.* holds no tokenizer: none of tokenizer\.json"):
        prepared(tmp_path, f"model.path={model}")


def test_a_tokenizer_larger_than_the_model(model: Path, tmp_path: Path):
    edit_json(model / "config.json", vocab_size=40)
    with pytest.raises(
        ConfigError, match=r"model\.path=.*: the tokenizer has ids up to \d+, .* vocab_size=40"
    ):
        prepared(tmp_path, f"model.path={model}")


# ------------------------------------------------------------------ batch, engine, warm start, data


def test_a_batch_smaller_than_data_parallelism(tmp_path: Path):
    prepared(tmp_path, data_parallel=12)
    with pytest.raises(
        ConfigError,
        match=r"prompts_per_update=4 x rollout\.group_size=3 = 12 sequences must feed the 13 data-parallel",
    ):
        prepared(tmp_path, data_parallel=13)


def test_an_option_that_this_machine_cannot_honour(tmp_path: Path):
    settings = ["policy.precision=bf16", "policy.distributed_optimizer=true"]
    with pytest.raises(
        ConfigError, match=r"policy\.options\.optimizer_on_host=0\.5 .* has no GPU: .* Set it to 0"
    ):
        prepared(tmp_path, *settings, "policy.options.optimizer_on_host=0.5")


def test_tensor_overlap_cannot_sample_by_the_policy(tmp_path: Path, pristine: Path):
    settings = ["policy.tensor_parallel=2", "policy.sequence_parallel=true", "policy.options.tp_overlap=true"]
    hf_config = AutoConfig.from_pretrained(pristine)
    with pytest.raises(
        ConfigError, match=r"tp_overlap=true does not go with rollout\.engine=native: .* use roll"
    ):
        preflight.check_model(config_of(tmp_path, *settings), hf_config)
    preflight.check_model(config_of(tmp_path, *settings, "rollout.engine=vllm"), hf_config)


def test_vllm_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "vllm_is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"rollout\.engine=vllm needs vLLM, .* or set rollout\.engine=native"
    ):
        prepared(tmp_path, "rollout.engine=vllm")


def test_an_engine_layout_that_does_not_divide_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "vllm_is_available", lambda: True)
    with pytest.raises(
        ConfigError, match=r"rollout\.tensor_parallel=2 must divide the 1 processes of this run"
    ):
        prepared(tmp_path, "rollout.engine=vllm", "rollout.tensor_parallel=2")
    prepared(tmp_path, "rollout.tensor_parallel=2")  # the native engine has no layout of its own


def test_an_engine_layout_that_does_not_divide_the_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "vllm_is_available", lambda: True)
    hf_config = SimpleNamespace(num_attention_heads=2)
    monkeypatch.setattr(preflight, "load_hf_config", lambda _: hf_config)
    monkeypatch.setattr(preflight, "check_model_sizes", lambda *_: None)
    rollout = SimpleNamespace(engine="vllm", tensor_parallel=3)
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel=3 must divide .* num_attention_heads=2"):
        preflight._read_inputs(SimpleNamespace(rollout=rollout, policy=None), tmp_path, tmp_path)  # type: ignore[arg-type]


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"trainer\.wandb=offline needs the wandb package"):
        prepared(tmp_path, "trainer.wandb=offline")


def test_a_warm_start_without_demonstrations(tmp_path: Path):
    with pytest.raises(
        ConfigError,
        match=r"warm_start\.steps=7 needs demonstrations, which only data\.train=embedded:countdown has",
    ):
        prepared(tmp_path, "warm_start.steps=7", "data.train=reasoning_gym:leg_counting")


@pytest.mark.parametrize("setting", ["data.train", "data.validation"])
def test_a_broken_data_file_names_its_setting_and_line(tmp_path: Path, setting: str):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(countdown_rows("train")[0]) + "\n{not json\n")
    with pytest.raises(
        ConfigError, match=rf"^{setting}=.*broken\.jsonl is broken JSON in line 2: .* Mend or delete it"
    ):
        prepared(tmp_path, f"{setting}={broken}")


# ------------------------------------------------------------------ the run folder


def test_a_run_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()  # not a mode without w: that does not stop root
    with pytest.raises(
        ConfigError, match=r"trainer\.run_dir=.*file/run cannot be written: Not a directory\. Choose"
    ):
        prepared(tmp_path, f"trainer.run_dir={tmp_path / 'file' / 'run'}")


def test_too_little_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = (model / "model.safetensors").stat().st_size
    # The kept two and the one that is written, then hf/ and warm_start/.
    needed = weights // 2 * 16 * 3 + 2 * weights
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    prepared(tmp_path, f"model.path={model}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    with pytest.raises(
        ConfigError, match=r"run has 0\.0 GB free, and 3 checkpoints of this model need 0\.0 GB\. Free"
    ):
        prepared(tmp_path, f"model.path={model}")
    aside = tmp_path / "run" / "checkpoints" / "damaged_step_000001"
    aside.mkdir(parents=True)
    (aside / "kept").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"run has 0\.0 GB free"):
        prepared(tmp_path, f"model.path={model}")
    (tmp_path / "run" / "checkpoints" / "half").write_bytes(b"x")  # new ones take the place of those there
    prepared(tmp_path, f"model.path={model}")


# ------------------------------------------------------------------ checkpoints


def test_resume_never_with_a_checkpoint_there(model: Path, tmp_path: Path):
    fake_checkpoint(tmp_path / "run", model)
    with pytest.raises(
        ConfigError, match=r"trainer\.resume=never, but .*checkpoints holds step_000003\. Use another"
    ):
        prepared(tmp_path, f"model.path={model}", "trainer.resume=never")


def test_a_damaged_checkpoint_is_passed_over(model: Path, tmp_path: Path):
    older = fake_checkpoint(tmp_path / "run", model)
    newest = shutil.copytree(older, older.with_name("step_000012"))
    (newest / "common.pt").write_bytes(b"x")
    inputs = prepared(tmp_path, f"model.path={model}")
    assert inputs.checkpoint == older
    assert inputs.damaged == {newest: "common.pt does not match its checksum"}
    (older / "metadata.json").unlink()
    with pytest.raises(
        ConfigError,
        match=r"no checkpoint in .*run/checkpoints is whole \(step_000012: common\.pt does not match its "
        r"checksum; step_000003: metadata\.json is missing\)\. Put one back, or move that folder away to begin",
    ):
        prepared(tmp_path, f"model.path={model}")


def test_a_checkpoint_of_another_model(model: Path, tmp_path: Path):
    fake_checkpoint(tmp_path / "run", model, hidden_size=96)
    with pytest.raises(
        ConfigError,
        match=r"is of another model, its hidden_size is 96 and that of model\.path is 64\. Use another",
    ):
        prepared(tmp_path, f"model.path={model}")


def test_a_checkpoint_of_the_other_optimizer(model: Path, tmp_path: Path):
    fake_checkpoint(tmp_path / "run", model)
    with pytest.raises(
        ConfigError, match=r"policy\.distributed_optimizer=True cannot read .* saved with False"
    ):
        prepared(tmp_path, f"model.path={model}", "policy.distributed_optimizer=true")


# ------------------------------------------------------------------ every rank, and convert


def test_a_fault_of_one_rank_stops_all_with_its_message(tmp_path: Path):
    """A disk that is missing on one node: the other ranks must not wait for it, and rank 0 must be able to say it."""

    def job(rank: int) -> str:
        run_dir = tmp_path / ("run" if rank == 0 else "file/run")
        with pytest.raises(ConfigError) as error:
            prepare_inputs(config_of(tmp_path / str(rank), f"trainer.run_dir={run_dir}"), data_parallel=2)
        return str(error.value)

    (tmp_path / "file").touch()
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    messages = run_on_ranks(2, job, deadline=30.0)
    assert messages[0] == messages[1]
    assert "file/run cannot be written: Not a directory" in messages[0]


@pytest.mark.parametrize("place", ["/", "/checkpoint", "run/checkpoints/step_000003"])
def test_convert_wants_a_checkpoint_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"is not RUN/checkpoints/step_NNNNNN of a run"):
        convert(Path(place), tmp_path / "out")


def test_convert_wants_a_whole_checkpoint_of_the_model(model: Path, tmp_path: Path):
    config = config_of(tmp_path, f"model.path={model}")
    checkpoint = fake_checkpoint(tmp_path / "run", model, hidden_size=96)
    save_config(config, tmp_path / "run" / "config.yaml")

    def job(rank: int) -> str:
        with pytest.raises(ConfigError) as error:
            convert(checkpoint, tmp_path / "out")
        return str(error.value)

    [message] = run_on_ranks(1, job)
    assert "is of another model, its hidden_size is 96" in message
    assert not (tmp_path / "out").exists()
