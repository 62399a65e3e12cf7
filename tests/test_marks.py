"""Marks, the reference policy and the instruments inside real updates: the same tokens and numbers in every layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_fixtures import (
    WEIGHTS,
    fp32,
    make_groups,
    off_policy,
    old_logprob_table,
    on_layout,
    pack_for,
    save_model,
)
from torch import Tensor

from megatron_fec.algorithm.strategies import marks_of
from megatron_fec.algorithm.thresholds import ThresholdLines
from megatron_fec.config import AlgorithmConfig, PolicyConfig, ScheduleConfig
from megatron_fec.marks import mark_update
from megatron_fec.policy.reference import ReferencePolicy
from megatron_fec.policy.step import (
    Policy,
    compute_logprobs,
    reduce_metrics,
    token_statistics,
    train_update,
    unwrapped,
)
from megatron_fec.token_loss import policy_token_loss
from megatron_fec.types import MicroBatch

OPTIONS: dict[str, dict[str, Any]] = {
    "clip_cov": {"clip_cov_share": 0.2, "clip_cov_low": 0.01, "clip_cov_high": 9.0},
    "kl_cov": {"kl_cov_share": 0.2},
    "high_entropy": {},
    "steer": {"form": "exact"},
    "archer": {"archer_kl_coef": 0.0, "stat_scope": "batch"},
    "clip": {},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("marks") / "qwen2", "qwen2")


def marked(
    policy: Policy, loss: str, micro_batch_tokens: int, table: Tensor, seed: int = 5
) -> list[MicroBatch]:
    """One update off policy, with its marks."""
    [update] = pack_for(policy, make_groups(), micro_batch_tokens=micro_batch_tokens)
    filled, _ = compute_logprobs(policy, [update])
    update = [off_policy(mb, table) for mb in filled[0]]
    marks = marks_of(loss, OPTIONS[loss])
    assert marks is not None
    return mark_update(policy, update, marks, weights=WEIGHTS, lines=ThresholdLines(), seed=seed)


def marks_by_token(
    policy: Policy, loss: str, micro_batch_tokens: int, table: Tensor
) -> dict[tuple[int, int], float]:
    found = {}
    for mb in marked(policy, loss, micro_batch_tokens, table):
        if mb.marks is not None:
            mask = mb.response_mask
            columns = (mb.sequence_ids, mb.position_ids, mb.marks)
            for sample, position, mark in zip(*(c[mask].tolist() for c in columns), strict=True):
                found[sample, position] = mark
            assert (mb.marks[~mask] == 0).all()
    return found


LAYOUTS: list[tuple[PolicyConfig, int, int]] = [
    (fp32(), 1, 40),  # several micro-batches
    (fp32(tensor_parallel=2), 1, 512),
    (fp32(), 2, 512),
    (fp32(context_parallel=2), 1, 512),
    (fp32(pipeline_parallel=2), 1, 40),
]


@pytest.mark.parametrize("loss", [name for name in OPTIONS if name != "clip"])
def test_the_same_tokens_are_chosen_in_every_layout(model_dir: Path, loss: str):
    table = old_logprob_table(model_dir)
    [expected] = on_layout(model_dir, partial(marks_by_token, loss=loss, micro_batch_tokens=512, table=table))
    values = torch.tensor(list(expected.values()))
    assert 0 < (values == values.min()).sum() < len(values)  # a choice
    for settings, data_parallel, tokens in LAYOUTS:
        ranks = on_layout(
            model_dir,
            partial(marks_by_token, loss=loss, micro_batch_tokens=tokens, table=table),
            settings,
            data_parallel=data_parallel,
        )
        found = {key: mark for rank in ranks for key, mark in rank.items()}
        assert found.keys() == expected.keys()
        # Weights of STEER inherit the rounding of log-probs; all else is 0 or 1.
        assert all(abs(found[key] - expected[key]) <= (1e-4 if loss == "steer" else 0) for key in expected)


def update_metrics(policy: Policy, loss: str, micro_batch_tokens: int, table: Tensor) -> dict[str, float]:
    """Means of one training pass with the loss, its instruments included."""
    if marks_of(loss, OPTIONS[loss]) is not None:
        update = marked(policy, loss, micro_batch_tokens, table)
    else:
        [packed] = pack_for(policy, make_groups(), micro_batch_tokens=micro_batch_tokens)
        [filled], _ = compute_logprobs(policy, [packed])
        update = [off_policy(mb, table) for mb in filled]
    algorithm = AlgorithmConfig(
        schedule=ScheduleConfig(name="grpo", total_steps=1),
        policy_loss=loss,
        options=OPTIONS[loss],
        prompts_per_update=1,
    )
    token_loss = policy_token_loss(algorithm, WEIGHTS, max_response_tokens=9, context_group=None, seed=0)
    sums, grad_norm = train_update(policy, update, token_loss)
    return reduce_metrics(sums, policy.layout).means() | {"grad_norm": grad_norm}


@pytest.mark.parametrize("loss", ["clip", "kl_cov"])
def test_losses_and_predicted_entropy_changes_are_those_of_one_rank(model_dir: Path, loss: str):
    table = old_logprob_table(model_dir)
    [expected] = on_layout(model_dir, partial(update_metrics, loss=loss, micro_batch_tokens=512, table=table))
    assert abs(expected["dH/predicted"]) > 1e-4 and expected["dH/predicted"] != expected["dH/unclipped"]
    regions = [expected[f"dH/region_{name}"] for name in ("E1", "E2", "E3", "E4", "none")]
    assert sum(regions) == pytest.approx(expected["dH/predicted"], rel=1e-9)
    assert expected["dH/measured"] == pytest.approx(
        0.0, abs=1e-6
    )  # before the first update nothing has changed
    for settings, data_parallel, tokens in LAYOUTS:
        ranks = on_layout(
            model_dir,
            partial(update_metrics, loss=loss, micro_batch_tokens=tokens, table=table),
            settings,
            data_parallel=data_parallel,
        )
        for found in ranks:
            assert found.keys() == expected.keys()
            assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)


def reference_after_an_update(policy: Policy, table: Tensor) -> tuple[bool, bool, float]:
    """Whether reference log-probs are the first ones, bit for bit; the policy keeps its weights; how far it moved."""
    [update] = pack_for(policy, make_groups())
    [first], _ = compute_logprobs(policy, [update])
    reference = ReferencePolicy(policy)
    algorithm = AlgorithmConfig(schedule=ScheduleConfig(name="grpo", total_steps=1), prompts_per_update=1)
    token_loss = policy_token_loss(algorithm, WEIGHTS, max_response_tokens=9, context_group=None, seed=0)
    policy.scheduler.step(increment=1)
    train_update(policy, [off_policy(mb, table) for mb in first], token_loss)
    before = [p.clone() for p in unwrapped(policy.chunks[0]).parameters()]
    [filled] = reference.fill(policy, [first])
    kept = all(
        torch.equal(a, b) for a, b in zip(before, unwrapped(policy.chunks[0]).parameters(), strict=True)
    )
    same, moved = True, 0.0
    for mb, (_, stats) in zip(filled, token_statistics(policy, first, second_moments=False), strict=True):
        if stats is not None:
            assert mb.reference_logprobs is not None and mb.old_logprobs is not None
            same &= torch.equal(mb.reference_logprobs, mb.old_logprobs)
            moved = max(moved, (stats.logprobs - mb.reference_logprobs).abs().max().item())
    return same, kept, moved


@pytest.mark.parametrize(
    "settings", [fp32(), fp32(tensor_parallel=2, distributed_optimizer=True), fp32(pipeline_parallel=2)]
)
def test_the_reference_policy_keeps_the_first_weights(model_dir: Path, settings: PolicyConfig):
    ranks = on_layout(
        model_dir, partial(reference_after_an_update, table=old_logprob_table(model_dir)), settings
    )
    assert all(same and kept for same, kept, _ in ranks)
    assert max(moved for _, _, moved in ranks) > 1e-3
