"""Going on after a checkpoint as if nothing had happened, in the same layout and in others, and what is refused."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from policy_fixtures import (
    assert_same_weights,
    build,
    copied_weights,
    fp32,
    make_groups,
    nll_step,
    on_layout,
    pack_for,
    save_model,
)
from torch import Tensor

from megatron_fec.config import ConfigError, OptimizerConfig, PolicyConfig
from megatron_fec.policy.checkpoint import (
    TrainerState,
    load_checkpoint,
    load_model_only,
    read_trainer_state,
)
from megatron_fec.policy.checkpoint_files import find_checkpoints
from megatron_fec.policy.checkpoint_save import save_checkpoint
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.step import Policy

OPTIMIZER = OptimizerConfig(lr=1e-2, lr_schedule="cosine", warmup_steps=3)
Steps = list[tuple[float, float]]  # loss, gradient norm


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen3")


def state(step: int) -> TrainerState:
    schedule = {"mode": "rise", "h_init": 2.5}
    return TrainerState(step=step, consumed_samples=7 * step, weight_version=step, schedule=schedule)


def steps(policy: Policy, count: int) -> Steps:
    (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=64)
    return [nll_step(policy, batches) for _ in range(count)]


def two_saved_and_two_more(
    model_dir: Path, directory: Path, settings: PolicyConfig
) -> Callable[[Policy], Any]:
    """Four steps with a checkpoint in the middle, then the last two again from it, in two other policies."""

    def job(policy: Policy) -> tuple[Steps, dict[str, Tensor], list[tuple[Steps, dict[str, Tensor]]]]:
        steps(policy, 2)
        path = save_checkpoint(policy, directory, state(2), keep=2)
        numbers = random_numbers()
        expected, weights = steps(policy, 2), copied_weights(policy)
        resumed = []
        for steps_before in (
            0,
            3,
        ):  # a fresh policy, and one that has gone another way, of which nothing may stay
            again = build(model_dir, settings, layout=policy.layout, optimizer=OPTIMIZER)
            steps(again, steps_before)
            load_checkpoint(again, path)
            assert random_numbers() == numbers
            resumed.append((steps(again, 2), copied_weights(again)))
        return expected, weights, resumed

    return job


def assert_resumed(ranks: list) -> None:
    for expected, weights, resumed in ranks:
        assert expected[0] != expected[1]
        for got, got_weights in resumed:
            assert got == expected
            assert_same_weights(got_weights, weights)


def random_numbers() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


@pytest.mark.parametrize("is_distributed", [False, True])
@pytest.mark.parametrize(
    ("layout", "data_parallel"),
    [({"tensor_parallel": 2}, 1), ({"pipeline_parallel": 2}, 1), ({}, 2), ({"context_parallel": 2}, 1)],
    ids=["tp2", "pp2", "dp2", "cp2"],
)
def test_resuming_changes_no_bit(
    model_dir: Path, tmp_path: Path, layout: dict[str, int], data_parallel: int, is_distributed: bool
) -> None:
    settings = fp32(distributed_optimizer=is_distributed, **layout)
    job = two_saved_and_two_more(model_dir, tmp_path, settings)
    assert_resumed(on_layout(model_dir, job, settings, data_parallel=data_parallel, optimizer=OPTIMIZER))
    hf_config = load_hf_config(str(model_dir))
    assert read_trainer_state(
        tmp_path / "step_000002", hf_config=hf_config, distributed_optimizer=is_distributed
    ) == state(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_the_learning_rate_is_that_of_the_configuration(model_dir: Path, tmp_path: Path) -> None:
    """A run that is prolonged or slowed down goes on with its new settings, at its old step."""

    def save(policy: Policy) -> float:
        steps(policy, 4)
        save_checkpoint(policy, tmp_path, state(4), keep=2)
        return policy.optimizer.param_groups[0]["lr"]

    def load(policy: Policy) -> list[tuple[float, float, tuple]]:
        load_checkpoint(policy, tmp_path / "step_000004")
        found = []
        for _ in range(2):
            found += [(g["lr"], g["weight_decay"], tuple(g["betas"])) for g in policy.optimizer.param_groups]
            policy.scheduler.step(1)
        return found

    changed = OptimizerConfig(lr=0.2, lr_schedule="cosine", warmup_steps=2, weight_decay=0.3, beta2=0.9)
    for is_distributed in (False, True):
        settings = fp32(distributed_optimizer=is_distributed)
        (before,) = on_layout(model_dir, save, settings, optimizer=OPTIMIZER, total_steps=5)
        assert before == pytest.approx(1e-2 * (1 + math.cos(math.pi * 1 / 3)) / 2)
        (groups,) = on_layout(model_dir, load, settings, optimizer=changed, total_steps=9)
        rates = [0.2 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (2, 3)]
        assert [lr for lr, _, _ in groups] == pytest.approx([rates[0], rates[0], rates[1], rates[1]])
        assert sorted(decay for _, decay, _ in groups) == [0.0, 0.0, 0.3, 0.3]
        assert {betas for _, _, betas in groups} == {(0.9, 0.9)}


def test_resuming_bf16_changes_no_bit(model_dir: Path, tmp_path: Path) -> None:
    settings = fp32(precision="bf16", distributed_optimizer=True)  # with fp32 master weights
    job = two_saved_and_two_more(model_dir, tmp_path, settings)
    assert_resumed(on_layout(model_dir, job, settings, data_parallel=2, optimizer=OPTIMIZER))


@pytest.mark.parametrize("is_distributed", [False, True])
@pytest.mark.parametrize(
    ("saved_in", "saved_ranks", "loaded_in", "loaded_ranks"),
    [
        ({}, 2, {}, 1),
        ({}, 1, {}, 2),
        ({"tensor_parallel": 2}, 1, {}, 1),
        ({}, 1, {"pipeline_parallel": 2}, 1),
        ({"pipeline_parallel": 2}, 1, {"tensor_parallel": 2}, 1),
        ({"context_parallel": 2}, 1, {"tensor_parallel": 2}, 1),
        ({}, 1, {"context_parallel": 2}, 1),
    ],
    ids=["dp2-dp1", "dp1-dp2", "tp2-tp1", "pp1-pp2", "pp2-tp2", "cp2-tp2", "cp1-cp2"],
)
def test_another_layout_goes_on_with_the_same_losses(
    model_dir: Path,
    tmp_path: Path,
    saved_in: dict[str, int],
    saved_ranks: int,
    loaded_in: dict[str, int],
    loaded_ranks: int,
    is_distributed: bool,
) -> None:
    def save(policy: Policy) -> Steps:
        steps(policy, 2)
        save_checkpoint(policy, tmp_path, state(2), keep=2)
        return steps(policy, 3)

    def load(policy: Policy) -> Steps:
        steps(policy, 1)
        load_checkpoint(policy, tmp_path / "step_000002")
        return steps(policy, 3)

    options: dict[str, Any] = {"optimizer": OPTIMIZER}
    before, after = (fp32(distributed_optimizer=is_distributed, **layout) for layout in (saved_in, loaded_in))
    wanted = on_layout(model_dir, save, before, data_parallel=saved_ranks, **options)[0]
    for got in on_layout(model_dir, load, after, data_parallel=loaded_ranks, **options):
        assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in wanted], rel=1e-6)
        assert [norm for _, norm in got] == pytest.approx([norm for _, norm in wanted], rel=1e-5)


def test_the_model_alone_is_read_in_another_layout(model_dir: Path, tmp_path: Path) -> None:
    def save(policy: Policy) -> dict[str, Tensor]:
        steps(policy, 2)
        save_checkpoint(policy, tmp_path, state(2), keep=2)
        return copied_weights(policy)

    def load(policy: Policy) -> dict[str, Tensor]:
        load_model_only(policy, tmp_path / "step_000002")
        return copied_weights(policy)

    wanted = on_layout(model_dir, save, fp32(tensor_parallel=2))[0]
    for weights in on_layout(model_dir, load, fp32(pipeline_parallel=2, distributed_optimizer=True)):
        assert_same_weights(weights, wanted)


def test_old_checkpoints_and_half_written_ones_are_removed(model_dir: Path, tmp_path: Path) -> None:
    half = tmp_path / ".writing_step_000007"  # of a run that died there
    half.mkdir()
    (half / "common.pt").write_bytes(b"half")
    (tmp_path / "step_notes").mkdir()

    def job(policy: Policy) -> None:
        for step in (8, 9, 10):
            save_checkpoint(policy, tmp_path, state(step), keep=2)
        save_checkpoint(policy, tmp_path, state(10), keep=2)  # again, as after a resume from step 9

    assert find_checkpoints(tmp_path) == []
    on_layout(model_dir, job)
    assert find_checkpoints(tmp_path) == [tmp_path / "step_000009", tmp_path / "step_000010"]
    assert not half.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"step_000009", "step_000010", "step_notes"}


def test_what_is_removed_is_no_checkpoint_by_its_name(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it removes one leaves nothing that a start would take for whole."""
    removed: list[str] = []
    rmtree = shutil.rmtree

    def watched(path: Any, *more: Any, **also: Any) -> None:
        if Path(path).parent == tmp_path:
            removed.append(Path(path).name)
        rmtree(path, *more, **also)

    def job(policy: Policy) -> list[str]:
        for step in (3, 3, 4):
            save_checkpoint(policy, tmp_path, state(step), keep=1)
        return removed

    monkeypatch.setattr(shutil, "rmtree", watched)
    (names,) = on_layout(model_dir, job)
    assert [name.rsplit("_", 1)[0] for name in names] == [".removing_step_000003"] * 2


def test_the_order_is_of_numbers(tmp_path: Path) -> None:
    for name in ("step_1000000", "step_999999", "step_12", ".writing_step_000001"):
        (tmp_path / name).mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_999999", "step_1000000"]


@pytest.fixture(scope="module")
def saved(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    on_layout(model_dir, lambda policy: save_checkpoint(policy, directory, state(4), keep=1))
    return directory / "step_000004"


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def read(checkpoint: Path, model_dir: Path, **changes: Any) -> TrainerState:
    config = load_hf_config(str(model_dir))
    for name, value in changes.items():
        setattr(config, name, value)
    return read_trainer_state(checkpoint, hf_config=config, distributed_optimizer=False)


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_size", 64), ("tie_word_embeddings", True), ("model_type", "qwen2")]
)
def test_another_model_is_refused(checkpoint: Path, model_dir: Path, name: str, value: Any) -> None:
    config = SimpleNamespace(**load_hf_config(str(model_dir)).to_dict())
    setattr(config, name, value)
    with pytest.raises(
        ConfigError, match=rf"is of another model, its {name} is .* and that of model\.path is {value}"
    ):
        read_trainer_state(checkpoint, hf_config=config, distributed_optimizer=False)


def test_another_kind_of_optimizer_is_refused(checkpoint: Path, model_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"policy\.distributed_optimizer=True cannot read .* saved with False"
    ):
        read_trainer_state(checkpoint, hf_config=load_hf_config(str(model_dir)), distributed_optimizer=True)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"trainer": {"step": 4', b"\xff\xfe\x00", b"[]", b"{}", b'{"trainer": {"step": 4}}'],
)
def test_a_trainer_state_that_is_not_readable_is_refused(
    checkpoint: Path, model_dir: Path, content: bytes
) -> None:
    (checkpoint / "trainer_state.json").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"trainer_state\.json is not readable .*Remove that folder to resume"
    ):
        read(checkpoint, model_dir)


@pytest.mark.parametrize("key", ["model", "distributed_optimizer"])
def test_a_trainer_state_without_a_part_is_refused(checkpoint: Path, model_dir: Path, key: str) -> None:
    path = checkpoint / "trainer_state.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"trainer_state\.json is not readable \('{key}'\)"):
        read(checkpoint, model_dir)
