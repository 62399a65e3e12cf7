"""What the losses share: counting, the metrics against the oracle, sums over responses, and missing inputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import reference
import torch
from loss_batch import F64, METRICS, batch, tokens_of, tokens_only
from ranks import run_on_ranks
from test_clipped_surrogate import one_side
from torch import Tensor

from megatron_fec.algorithm.aggregation import AGGREGATIONS, RATIO_MOVED, loss_output, response_sums
from megatron_fec.algorithm.losses import clipped_surrogate
from megatron_fec.metrics import MetricSums
from megatron_fec.types import ClipBounds, LossInputs


def metrics(inputs: LossInputs) -> MetricSums:
    return clipped_surrogate(inputs).metrics


BY_HAND = {
    "token_mean": (14.0, 4),
    "seq_mean_token_mean": (12 / 3 + 2 / 1, 2),
    "seq_mean_token_sum": (14.0, 2),
    "seq_mean_token_sum_norm": (14 / 8, 2),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_by_hand(aggregation: str) -> None:
    loss_sum, count = BY_HAND[aggregation]
    inputs = LossInputs(
        logprobs=torch.zeros(6),
        old_logprobs=torch.zeros(6),
        advantages=torch.zeros(6),
        response_mask=torch.tensor([True, False, True, True, True, False]),
        bounds=ClipBounds(eps_lower=torch.tensor(0.2), eps_upper=torch.tensor(0.2)),
        sequence_ids=torch.tensor([4, 4, 4, 4, 7, 9]),
        max_response_tokens=8,
        aggregation=aggregation,
    )
    output = loss_output(torch.tensor([3.0, math.nan, 4.0, 5.0, 2.0, math.inf]), inputs)
    assert output.loss_sum.item() == pytest.approx(loss_sum) and output.count.item() == count
    halves = dataclasses.replace(inputs, weights=torch.full((6,), 0.5))
    output = loss_output(torch.tensor([3.0, math.nan, 4.0, 5.0, 2.0, math.inf]), halves)
    assert output.loss_sum.item() == pytest.approx(loss_sum / 2) and output.count.item() == count


def test_sequences_without_response_do_not_count() -> None:
    inputs = batch(aggregation="seq_mean_token_mean")
    assert clipped_surrogate(inputs).count.item() == 3  # of 0, 1, 2 and 3, the third has none; -1 is padding


@pytest.mark.parametrize(
    "aggregation", ["seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
)
def test_sequence_aggregations_need_ids(aggregation: str) -> None:
    inputs = batch(aggregation=aggregation)
    with pytest.raises(ValueError, match=rf"aggregation {aggregation} needs LossInputs\.sequence_ids"):
        clipped_surrogate(dataclasses.replace(inputs, sequence_ids=None))
    with pytest.raises(ValueError, match=rf"aggregation {aggregation} needs LossInputs\.response_starts"):
        clipped_surrogate(dataclasses.replace(inputs, response_lengths=inputs.sequence_ids))


def test_a_norm_needs_its_divisor() -> None:
    inputs = batch(aggregation="seq_mean_token_sum_norm", max_response_tokens=None)
    with pytest.raises(ValueError, match=r"needs LossInputs\.max_response_tokens"):
        clipped_surrogate(inputs)


@pytest.mark.parametrize("size", [1, 3])
def test_response_sums(size: int) -> None:
    whole = batch()
    expected = []
    tokens = tokens_of(whole)
    for t in tokens:
        own = [o.a for o in tokens if o.counts and o.sequence == max(t.sequence, 0)]
        expected.append((math.fsum(own), len(own)))
    places = [torch.arange(rank, len(tokens), size) for rank in range(size)]

    def job(rank: int) -> Tensor:
        part = tokens_only(whole, places[rank])
        group = torch.distributed.group.WORLD if size > 1 else None
        part = dataclasses.replace(part, context_group=group)
        return torch.stack(response_sums(part.advantages, part, "a test"), 1)

    got = torch.empty(len(tokens), 2, dtype=F64)
    got[torch.cat(places)] = torch.cat([job(0)] if size == 1 else run_on_ranks(size, job))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)


# ---- metrics ----


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_metrics_against_reference(dual_clip: float | None) -> None:
    inputs = batch((0.7, 0.4))
    sums = clipped_surrogate(inputs, dual_clip=dual_clip).metrics
    assert sums.names == METRICS and sums.histogram_names == ("eps_upper", "eps_lower")
    assert not sums.flat().requires_grad
    tokens = [t for t in tokens_of(inputs) if t.counts]
    lp, old, a, low, up, h = zip(*((t.lp, t.old, t.a, t.low, t.up, t.h) for t in tokens), strict=True)
    expected = reference.metrics(lp, old, a, low, up, h, dual_clip)
    means = sums.means()
    for name in METRICS:
        assert means[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name
    assert min(means["clip_fraction_upper"], means["clip_fraction_lower"]) > 0
    assert sums.sums[:, 1].tolist() == [len(tokens)] * len(METRICS)
    assert sums.histograms.sum(1).tolist() == [len(tokens)] * 2
    assert means["eps_upper_p50"] == pytest.approx(
        inputs.bounds.eps_upper[inputs.response_mask].median().item(), abs=1 / 200
    )


def test_more_metrics_come_last_and_are_token_means() -> None:
    inputs = batch()
    extra: dict[str, Any] = {
        "odd": torch.arange(len(inputs.logprobs)) % 2 == 1,
        "one": torch.ones(len(inputs.logprobs)),
    }
    sums = loss_output(inputs.logprobs, inputs, metrics=extra).metrics
    assert sums.names == (*METRICS, "odd", "one")
    assert sums.means()["odd"] == pytest.approx((inputs.response_mask & extra["odd"]).sum().item() / 107)
    assert sums.means()["one"] == 1


def test_approx_kl_estimates_kl_from_old_to_new() -> None:
    q, p = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    inputs = dataclasses.replace(one_side(1.0, 0.0), logprobs=p.log(), old_logprobs=q.log())
    masks = torch.eye(3, dtype=torch.bool)
    alone = [metrics(dataclasses.replace(inputs, response_mask=mask)) for mask in masks]
    per_token = torch.stack([sums.sums[sums.names.index("approx_kl"), 0] for sums in alone])
    expected = (q * (q / p).log()).sum()  # the tokens come from the old policy q
    torch.testing.assert_close((q * per_token).sum(), expected, rtol=1e-12, atol=0)


def test_approx_kl_of_a_small_change_survives_float32() -> None:
    lp = torch.tensor([-1.0, -2.0], dtype=torch.float32)
    inputs = dataclasses.replace(
        one_side(1.0, 0.0),
        logprobs=lp,
        old_logprobs=lp + 2**-10,
        advantages=torch.ones(2),
        response_mask=torch.ones(2, dtype=torch.bool),
        bounds=ClipBounds(eps_lower=torch.full((2,), 0.2), eps_upper=torch.full((2,), 0.2)),
    )
    assert metrics(inputs).means()["approx_kl"] == pytest.approx(2**-21, rel=1e-3)  # d^2 / 2


def test_ratio_moved_ignores_kernel_noise() -> None:
    for log_ratio, moved in ((0.5 * RATIO_MOVED, 0.0), (-2 * RATIO_MOVED, 1.0), (2 * RATIO_MOVED, 1.0)):
        assert metrics(one_side(1.0, log_ratio)).means()["ratio_moved"] == moved


def test_a_distance_above_one_stays_in_the_histogram() -> None:
    bounds = ClipBounds(eps_lower=torch.full((3,), 0.2), eps_upper=torch.full((3,), 1.7))
    sums = metrics(dataclasses.replace(one_side(1.0, 0.0), bounds=bounds))
    assert sums.histograms.sum(1).tolist() == [3, 3]


def test_without_entropy_there_is_no_entropy_metric() -> None:
    assert metrics(one_side(1.0, 0.1)).names == METRICS[1:]
