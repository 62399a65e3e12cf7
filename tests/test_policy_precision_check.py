"""The FP8 monitor's comparison, with weights rounded to bf16 in the place of FP8: against float64, and in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_fixtures import (
    WEIGHTS,
    clip_token_loss,
    fp32,
    hf_tokens,
    make_groups,
    off_policy,
    old_logprob_table,
    on_layout,
    pack_for,
    save_model,
)
from policy_fixtures import advantages as advantages_of_groups
from safetensors.torch import load_file, save_file

from megatron_fec.algorithm.thresholds import ThresholdLines
from megatron_fec.policy.precision_check import start_check
from megatron_fec.policy.step import Policy, cores, train_update
from megatron_fec.types import BlendWeights, MicroBatch

LINES = ThresholdLines()
NAMES = ("logprob_error", "logprob_bias", "entropy_error", "entropy_bias", "flipped", "clipped")
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "TP2": ({"tensor_parallel": 2}, 1),
    "TP2 with sequence parallelism": ({"tensor_parallel": 2, "sequence_parallel": True}, 1),
    "PP2": ({"pipeline_parallel": 2}, 1),
    "DP2": ({}, 2),
    "CP2": ({"context_parallel": 2}, 1),
    "TP2 PP2 DP2": ({"tensor_parallel": 2, "pipeline_parallel": 2}, 2),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3_kv4"), "qwen3_kv4")


@contextmanager
def rounded(policy: Policy) -> Iterator[None]:
    """Inside the block the weights have the values that bf16 keeps of them."""
    core = cores(policy)[0]
    own = [p.detach().clone() for p in core.parameters()]
    try:
        for p in core.parameters():
            p.data.copy_(p.data.bfloat16())
        yield
    finally:
        for p, value in zip(core.parameters(), own, strict=True):
            p.data.copy_(value)


def batch_of(policy: Policy, table: torch.Tensor) -> list[list[MicroBatch]]:
    """One micro-batch a data-parallel rank: together the same tokens in every layout."""
    ((batch,),) = pack_for(policy, make_groups(), multiple=2)
    return [[off_policy(batch, table)]]


def clipped(logprob: float, old: float, advantage: float, weights: BlendWeights) -> bool:
    """Section 4.2 of the paper in Python's floats."""
    ratio, p = torch.tensor(logprob - old).double().exp().item(), torch.tensor(logprob).double().exp().item()
    upper = 0.2 + weights.upper * (-0.25 * p + 0.5 - 0.2)
    lower = 0.2 + weights.lower * (-0.13 * p + 0.3 - 0.2)
    return (advantage > 0 and ratio > 1 + upper) or (advantage < 0 and ratio < 1 - lower)


def test_against_float64(model_dir: Path, tmp_path: Path) -> None:
    """Without an update in between a ratio in the exact precision is 1, so what the other one clips is flipped."""
    table = old_logprob_table(model_dir)

    def job(policy: Policy) -> dict[str, float]:
        check = start_check(policy, batch_of(policy, table), draw=0, exactly=rounded)
        return check.finish(WEIGHTS, lines=LINES)

    (found,) = on_layout(model_dir, job)
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(model_dir / "model.safetensors")
    save_file(
        {name: tensor.bfloat16().float() for name, tensor in weights.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    low = hf_tokens(model_dir, make_groups(), torch.float64)
    exact = hf_tokens(tmp_path, make_groups(), torch.float64)
    advantages = advantages_of_groups().flatten().tolist()
    count = len(low)
    logprob = [low[key][0] - exact[key][0] for key in low]
    entropy = [low[key][1] - exact[key][1] for key in low]
    flips = sum(clipped(low[k][0], float(table[k]), advantages[k[0]], WEIGHTS) for k in low)
    assert 0 < flips < count and max(map(abs, logprob)) > 1e-3  # there is something to see
    wanted = {
        "logprob_error": sum(map(abs, logprob)) / count,
        "logprob_bias": sum(logprob) / count,
        "entropy_error": sum(map(abs, entropy)) / count,
        "entropy_bias": sum(entropy) / count,
        "flipped": flips / count,
        "clipped": 0.0,
    }
    assert found == pytest.approx({f"fp8/{name}": value for name, value in wanted.items()}, abs=3e-6, rel=0)


def after_an_update(policy: Policy, table: torch.Tensor) -> dict[str, float]:
    """As a step does it: the check starts, an update moves the weights by much, the check ends."""
    updates = batch_of(policy, table)
    check = start_check(policy, updates, draw=7, exactly=rounded)
    policy.scheduler.step(1)
    train_update(policy, updates[0], clip_token_loss)
    return check.finish(WEIGHTS, lines=LINES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_the_same(model_dir: Path, name: str) -> None:
    table = old_logprob_table(model_dir)

    def job(policy: Policy) -> dict[str, float]:
        return after_an_update(policy, table)

    (wanted,) = on_layout(model_dir, job)
    assert wanted["fp8/flipped"] > 0 and wanted["fp8/clipped"] > 0
    settings, data_parallel = LAYOUTS[name]
    found = on_layout(model_dir, job, fp32(**settings), data_parallel=data_parallel)
    assert all(means == found[0] for means in found)  # the same bits, so that all ranks stop together
    # A weight between two values of bf16 may round to either after an update; found 1.7e-5 at DP2, 1.3e-7 elsewhere.
    assert found[0] == pytest.approx(wanted, abs=1e-4, rel=0)


def test_the_draw_names_the_micro_batch(model_dir: Path) -> None:
    """Every one is drawn, and without FP8 both passes are the same bits."""
    table = old_logprob_table(model_dir)

    def job(policy: Policy) -> None:
        packed = pack_for(policy, make_groups(), micro_batch_tokens=24, prompts_per_update=2)
        updates = [[off_policy(batch, table) for batch in update] for update in packed]
        assert len(updates) == 2 and min(map(len, updates)) > 1
        checks = [start_check(policy, updates, draw=draw) for draw in range(12)]
        seen = {tuple(check.micro_batch.sequence_ids.tolist()) for check in checks}
        assert seen == {tuple(batch.sequence_ids.tolist()) for update in updates for batch in update}
        means = checks[0].finish(WEIGHTS, lines=LINES)
        assert [means[f"fp8/{name}"] for name in NAMES[:4]] == [0.0] * 4

    on_layout(model_dir, job)
