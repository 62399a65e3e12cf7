"""The error of a precision on tokens chosen by hand: which are clipped on each side, and what counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_fec.algorithm.precision_error import precision_error
from megatron_fec.algorithm.thresholds import ThresholdLines
from megatron_fec.metrics import MetricSums
from megatron_fec.types import BlendWeights, MicroBatch, TokenStats

GRPO = BlendWeights(upper=0.0, lower=0.0)  # every ratio may move by 0.2
NONE = torch.zeros(0, dtype=torch.int64)


def batch(old: Tensor, advantages: Tensor, mask: Tensor) -> MicroBatch:
    zeros = torch.zeros(len(old), dtype=torch.int64)
    return MicroBatch(
        tokens=zeros,
        labels=zeros,
        position_ids=zeros,
        cu_seqlens=torch.tensor([0, len(old)], dtype=torch.int32),
        max_seqlen=len(old),
        sequence_ids=zeros,
        response_mask=mask,
        response_starts=mask,
        response_lengths=zeros,
        update_lengths=NONE,
        advantages=advantages,
        rollout_logprobs=old,
        old_logprobs=old,
    )


def stats(logprobs: Tensor, entropy: float) -> TokenStats:
    return TokenStats(logprobs=logprobs, entropy=torch.full_like(logprobs, entropy))


def means(weights: BlendWeights = GRPO) -> dict[str, float]:
    """Seven tokens: clipped in neither, in both, in low, in exact on each side, on the harmless side, not a response."""
    old = torch.full((7,), -1.0)
    low_ratio = torch.tensor([1.1, 1.3, 1.21, 0.79, 1.1, 0.5, 3.0])
    exact_ratio = torch.tensor([1.0, 1.4, 1.19, 0.81, 1.3, 0.6, 1.0])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
    mask = torch.tensor([True] * 6 + [False])
    pairs = precision_error(
        stats(old + low_ratio.log(), 2.5),
        stats(old + 0.25 + exact_ratio.log(), 2.25),
        batch(old, advantages, mask),
        exact_old_logprobs=old + 0.25,  # its own: the ratio has no error of the denominator
        weights=weights,
        lines=ThresholdLines(),
    )
    assert all(int(count) == 6 for _, count in pairs.values())
    return MetricSums.of(pairs).means()


def test_which_decisions_flip() -> None:
    found = means()
    assert found["flipped"] == pytest.approx(
        3 / 6
    )  # the third and fourth in low alone, the fifth in exact alone
    assert found["clipped"] == pytest.approx(2 / 6)  # the second and the fifth


def test_the_bounds_of_the_step_decide() -> None:
    """With the dynamic upper line, p = 0.4 to 0.6 may rise by 0.35 to 0.4: only 1.4 at p = 0.66 is beyond."""
    found = means(BlendWeights(upper=1.0, lower=0.0))
    assert found["flipped"] == pytest.approx(2 / 6)  # the second and the fourth
    assert found["clipped"] == pytest.approx(1 / 6)


def test_error_and_bias() -> None:
    found = means()
    low = [1.1, 1.3, 1.21, 0.79, 1.1, 0.5]
    exact = [1.0, 1.4, 1.19, 0.81, 1.3, 0.6]
    differences = [math.log(a / b) - 0.25 for a, b in zip(low, exact, strict=True)]
    assert found["logprob_bias"] == pytest.approx(sum(differences) / 6, abs=1e-6)
    assert found["logprob_error"] == pytest.approx(sum(map(abs, differences)) / 6, abs=1e-6)
    assert (found["entropy_bias"], found["entropy_error"]) == (0.25, 0.25)


def test_nothing_to_compare_counts_nothing() -> None:
    old = torch.zeros(3)
    nothing = batch(old, old, torch.zeros(3, dtype=torch.bool))
    pairs = precision_error(
        stats(old, 1.0),
        stats(old, 2.0),
        nothing,
        exact_old_logprobs=old,
        weights=GRPO,
        lines=ThresholdLines(),
    )
    assert all((float(total), int(count)) == (0.0, 0) for total, count in pairs.values())
