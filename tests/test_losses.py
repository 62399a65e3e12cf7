"""The clipped surrogate against the oracle, values and gradients, and what it reduces to."""

import dataclasses
import math
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from megatron_fec.algorithm.losses import (
    AGGREGATIONS,
    POLICY_LOSSES,
    RATIO_MOVED,
    clipped_surrogate,
    negative_log_likelihood,
    policy_metrics,
)
from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds
from megatron_fec.config import CHOICES
from megatron_fec.metrics import MetricSums
from megatron_fec.types import BlendWeights, ClipBounds, LossInputs, LossOutput

F64 = torch.float64
METRICS = (
    "entropy",
    "eps_upper_mean",
    "eps_lower_mean",
    "clip_fraction_upper",
    "clip_fraction_lower",
    "dual_clip_fraction",
    "ratio_moved",
    "log_ratio_abs",
    "approx_kl",
)
WEIGHTS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.7, 0.4)]
LOG_RATIOS = [-25.0, -1.0, -0.3, -0.21, -0.05, 0.0, 0.05, 0.25, 0.35, 0.5, 1.2, 25.0]


def batch(
    weights: tuple[float, float] = (1.0, 1.0),
    *,
    dtype: torch.dtype = F64,
    log_ratios: list[float] = LOG_RATIOS,
    **settings: Any,
) -> LossInputs:
    """Every log ratio with A > 0, A < 0 and A = 0, in 5 sequences of uneven length, one of them without response."""
    d = torch.tensor(log_ratios, dtype=F64).repeat(3)
    size = len(d)
    base = -0.02 - 3 * torch.rand(size, dtype=F64, generator=torch.Generator().manual_seed(1)) ** 2
    logprobs = (base + d.clamp(max=0)).to(dtype)
    advantages = torch.tensor([0.7, -1.3, 0.0], dtype=F64).repeat_interleave(len(log_ratios))
    ids = torch.tensor([0, 1, 2, 3, -1]).repeat_interleave(torch.tensor([5, 9, 4, size - 21, 3]))
    mask = (torch.arange(size) % 5 != 2) & (ids >= 0) & (ids != 2)
    bounds = clip_bounds(
        logprobs.exp(), BlendWeights(upper=weights[0], lower=weights[1]), lines=ThresholdLines()
    )
    return LossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=(base - d.clamp(min=0)).to(dtype),
        advantages=advantages.to(dtype),
        response_mask=mask,
        bounds=bounds,
        entropy=torch.linspace(0.1, 2.0, size, dtype=dtype),
        sequence_ids=ids,
        **settings,
    )


def gradient(output: LossOutput, inputs: LossInputs) -> Tensor:
    return torch.autograd.grad(output.loss_sum, inputs.logprobs)[0]


def reference_tokens(inputs: LossInputs, weights: tuple[float, float]) -> list[tuple[float, float]]:
    """(loss, gradient) of every token; the bounds, too, are computed in float64 and not taken from the inputs."""
    columns = (inputs.logprobs.tolist(), inputs.old_logprobs.tolist(), inputs.advantages.tolist())
    return [
        reference.clip_loss(lp, old, a, *reference.bounds(math.exp(lp), *weights), inputs.dual_clip)
        for lp, old, a in zip(*columns, strict=True)
    ]


def tokens_only(inputs: LossInputs, keep: Tensor) -> LossInputs:
    """The tokens of `inputs` that `keep` names, as another micro-batch."""
    assert inputs.entropy is not None and inputs.sequence_ids is not None
    return dataclasses.replace(
        inputs,
        logprobs=inputs.logprobs[keep],
        old_logprobs=inputs.old_logprobs[keep],
        advantages=inputs.advantages[keep],
        response_mask=inputs.response_mask[keep],
        bounds=ClipBounds(eps_lower=inputs.bounds.eps_lower[keep], eps_upper=inputs.bounds.eps_upper[keep]),
        entropy=inputs.entropy[keep],
        sequence_ids=inputs.sequence_ids[keep],
    )


def test_names_are_those_of_the_configuration() -> None:
    assert tuple(POLICY_LOSSES) == CHOICES["algorithm.policy_loss"]
    assert tuple(AGGREGATIONS) == CHOICES["algorithm.aggregation"]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_float64_against_reference(
    weights: tuple[float, float], dual_clip: float | None, aggregation: str
) -> None:
    inputs = batch(weights, dual_clip=dual_clip, aggregation=aggregation)
    assert inputs.sequence_ids is not None
    losses, gradients = zip(*reference_tokens(inputs, weights), strict=True)
    mask = inputs.response_mask.tolist()
    loss_sum, count, shares = reference.aggregate(losses, mask, inputs.sequence_ids.tolist(), aggregation)
    output = POLICY_LOSSES["clip"](inputs)
    assert output.loss_sum.item() == pytest.approx(loss_sum, rel=1e-12)
    assert output.count.item() == count and not output.count.is_floating_point()
    expected = torch.tensor([g * w for g, w in zip(gradients, shares, strict=True)], dtype=F64)
    torch.testing.assert_close(gradient(output, inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_each_token_alone_against_reference(dual_clip: float | None) -> None:
    inputs = batch(
        (1.0, 1.0), dual_clip=dual_clip
    )  # the sum above would hide a small token behind a large one
    for t, (loss, _) in enumerate(reference_tokens(inputs, (1.0, 1.0))):
        got = clipped_surrogate(tokens_only(inputs, torch.tensor([t]))).loss_sum.item()
        assert got == pytest.approx(loss if inputs.response_mask[t] else 0.0, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_float32_against_reference(weights: tuple[float, float]) -> None:
    inputs = batch(weights, dtype=torch.float32, dual_clip=3.0)
    losses, gradients = zip(*reference_tokens(inputs, weights), strict=True)
    expected = torch.tensor(gradients) * inputs.response_mask
    output = clipped_surrogate(inputs)
    assert output.loss_sum.dtype == torch.float32
    kept = [loss for loss, counts in zip(losses, inputs.response_mask.tolist(), strict=True) if counts]
    assert output.loss_sum.item() == pytest.approx(math.fsum(kept), abs=1e-6 * math.fsum(map(abs, kept)))
    largest = expected.abs().max().item()
    torch.testing.assert_close(gradient(output, inputs), expected, rtol=0, atol=1e-6 * largest)


def test_the_grid_reaches_every_case() -> None:
    means = clipped_surrogate(batch(dual_clip=3.0)).metrics.means()
    for name in METRICS:
        assert means[name] > 0, name
    assert 0 < means["ratio_moved"] < 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_zero_weights_are_grpo_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = batch((0.0, 0.0), dtype=dtype)
    logprobs = inputs.logprobs.detach().clone().requires_grad_()
    ratio = (logprobs - inputs.old_logprobs).clamp(-20, 20).exp()
    objective = torch.minimum(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)
    grpo = torch.where(inputs.response_mask, -objective, 0.0).sum()
    output = clipped_surrogate(inputs)
    assert torch.equal(output.loss_sum, grpo)
    assert torch.equal(gradient(output, inputs), torch.autograd.grad(grpo, logprobs)[0])


def test_ratio_one_is_the_plain_policy_gradient() -> None:
    for weights in WEIGHTS:
        inputs = batch(weights, log_ratios=[0.0] * 12, dual_clip=3.0)
        output = clipped_surrogate(inputs)
        assert torch.equal(gradient(output, inputs), -inputs.advantages * inputs.response_mask)
        means = output.metrics.means()
        for name in ("clip_fraction_upper", "clip_fraction_lower", "dual_clip_fraction", "ratio_moved"):
            assert means[name] == 0
        assert means["approx_kl"] == means["log_ratio_abs"] == 0


def one_side(advantage: float, log_ratio: float, logprob: float = -0.3) -> LossInputs:
    lp = torch.full((3,), logprob, dtype=F64, requires_grad=True)
    return LossInputs(
        logprobs=lp,
        old_logprobs=lp.detach() - log_ratio,
        advantages=torch.full((3,), advantage, dtype=F64),
        response_mask=torch.ones(3, dtype=torch.bool),
        bounds=clip_bounds(lp.exp(), BlendWeights(upper=1.0, lower=1.0), lines=ThresholdLines()),
    )


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "leak"),
    [(0.7, 0.6, 0.25 * 0.7), (-1.3, -0.6, -0.13 * -1.3)],  # per unit of p
)
def test_a_clipped_token_has_no_gradient_because_the_bounds_are_detached(
    advantage: float, log_ratio: float, leak: float
) -> None:
    inputs = one_side(advantage, log_ratio)
    assert torch.equal(gradient(clipped_surrogate(inputs), inputs), torch.zeros(3, dtype=F64))
    p = inputs.logprobs.exp()
    leaking = ClipBounds(eps_lower=-0.13 * p + 0.3, eps_upper=-0.25 * p + 0.5)
    output = clipped_surrogate(dataclasses.replace(inputs, bounds=leaking))
    assert torch.equal(output.loss_sum.detach(), clipped_surrogate(inputs).loss_sum.detach())
    torch.testing.assert_close(gradient(output, inputs), leak * p.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("advantage", "log_ratio"), [(0.7, -0.6), (-1.3, 0.6)])
def test_the_other_side_is_never_clipped(advantage: float, log_ratio: float) -> None:
    inputs = one_side(advantage, log_ratio)
    output = clipped_surrogate(inputs)
    expected = torch.full((3,), -advantage * math.exp(log_ratio), dtype=F64)
    torch.testing.assert_close(gradient(output, inputs), expected, rtol=1e-12, atol=0)
    means = output.metrics.means()
    assert means["clip_fraction_upper"] == means["clip_fraction_lower"] == 0


@pytest.mark.parametrize("advantage", [0.7, -1.3])
def test_at_a_bound_exactly_the_gradient_is_whole(advantage: float) -> None:
    zero = torch.zeros(3, dtype=F64)  # ratio and both bounds are exactly 1
    inputs = dataclasses.replace(one_side(advantage, 0.0), bounds=ClipBounds(eps_lower=zero, eps_upper=zero))
    output = clipped_surrogate(inputs)
    assert gradient(output, inputs).tolist() == [-advantage] * 3
    assert output.metrics.means()["clip_fraction_upper"] == output.metrics.means()["clip_fraction_lower"] == 0


@pytest.mark.parametrize("log_ratio", [-25.0, -0.6, 0.6, 25.0])
def test_without_advantage_nothing_is_clipped(log_ratio: float) -> None:
    inputs = dataclasses.replace(one_side(0.0, log_ratio), dual_clip=3.0)
    output = clipped_surrogate(inputs)
    assert output.loss_sum.item() == 0 and torch.equal(gradient(output, inputs), torch.zeros(3, dtype=F64))
    means = output.metrics.means()
    assert means["clip_fraction_upper"] == means["clip_fraction_lower"] == means["dual_clip_fraction"] == 0


def test_the_log_ratio_clamp_stops_value_and_gradient() -> None:
    inputs = dataclasses.replace(one_side(-1.0, 0.6), log_ratio_clamp=0.5)
    output = clipped_surrogate(inputs)
    assert output.loss_sum.item() == pytest.approx(3 * math.exp(0.5), rel=1e-12)
    assert torch.equal(gradient(output, inputs), torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_split_into_micro_batches_does_not_matter(aggregation: str) -> None:
    inputs = batch((0.7, 0.4), dual_clip=3.0, aggregation=aggregation)
    assert inputs.sequence_ids is not None
    whole = clipped_surrogate(inputs)
    parts = []
    for members in ([0], [1, 2], [3, -1]):  # whole sequences, as packing makes them
        keep = torch.isin(inputs.sequence_ids, torch.tensor(members)).nonzero().flatten()
        parts.append(clipped_surrogate(tokens_only(inputs, keep)))
    loss_sum = torch.stack([part.loss_sum for part in parts]).sum()
    torch.testing.assert_close(loss_sum, whole.loss_sum, rtol=1e-12, atol=1e-12)
    assert sum(part.count.item() for part in parts) == whole.count.item()
    torch.testing.assert_close(
        torch.autograd.grad(loss_sum, inputs.logprobs)[0], gradient(whole, inputs), rtol=1e-12, atol=1e-12
    )
    metrics: MetricSums = parts[0].metrics + parts[1].metrics + parts[2].metrics
    torch.testing.assert_close(metrics.flat(), whole.metrics.flat(), rtol=1e-12, atol=1e-12)


def test_sequences_without_response_do_not_count() -> None:
    inputs = batch(aggregation="seq_mean_token_mean")
    assert clipped_surrogate(inputs).count.item() == 3  # of 0, 1, 2 and 3, the third has none; -1 is padding


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_metrics_against_reference(dual_clip: float | None) -> None:
    inputs = batch((0.7, 0.4), dual_clip=dual_clip)
    assert inputs.entropy is not None
    sums = policy_metrics(inputs)
    assert sums.names == METRICS and sums.histogram_names == ("eps_upper", "eps_lower")
    assert not sums.flat().requires_grad
    kept = tokens_only(inputs, inputs.response_mask.nonzero().flatten())
    assert kept.entropy is not None
    expected = reference.metrics(
        kept.logprobs.tolist(),
        kept.old_logprobs.tolist(),
        kept.advantages.tolist(),
        kept.bounds.eps_lower.tolist(),
        kept.bounds.eps_upper.tolist(),
        kept.entropy.tolist(),
        dual_clip,
    )
    means = sums.means()
    for name in METRICS:
        assert means[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name
    num_tokens = inputs.response_mask.sum().item()
    assert sums.sums[:, 1].tolist() == [num_tokens] * len(METRICS)
    assert sums.histograms.sum(1).tolist() == [num_tokens] * 2
    assert means["eps_upper_p50"] == pytest.approx(
        inputs.bounds.eps_upper[inputs.response_mask].median().item(), abs=1 / 200
    )


def test_approx_kl_estimates_kl_from_old_to_new() -> None:
    q, p = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    inputs = dataclasses.replace(one_side(1.0, 0.0), logprobs=p.log(), old_logprobs=q.log())
    masks = torch.eye(3, dtype=torch.bool)
    alone = [policy_metrics(dataclasses.replace(inputs, response_mask=mask)) for mask in masks]
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
    assert policy_metrics(inputs).means()["approx_kl"] == pytest.approx(2**-21, rel=1e-3)  # d^2 / 2


def test_ratio_moved_ignores_kernel_noise() -> None:
    for log_ratio, moved in ((0.5 * RATIO_MOVED, 0.0), (-2 * RATIO_MOVED, 1.0), (2 * RATIO_MOVED, 1.0)):
        assert policy_metrics(one_side(1.0, log_ratio)).means()["ratio_moved"] == moved


def test_a_distance_above_one_stays_in_the_histogram() -> None:
    bounds = ClipBounds(eps_lower=torch.full((3,), 0.2), eps_upper=torch.full((3,), 1.7))
    sums = policy_metrics(dataclasses.replace(one_side(1.0, 0.0), bounds=bounds))
    assert sums.histograms.sum(1).tolist() == [3, 3]


def test_without_entropy_there_is_no_entropy_metric() -> None:
    assert policy_metrics(one_side(1.0, 0.1)).names == METRICS[1:]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("field", ["logprobs", "old_logprobs", "advantages", "entropy", "bounds", "all"])
def test_nothing_outside_the_response_reaches_the_loss(aggregation: str, field: str) -> None:
    inputs = batch((0.7, 0.4), dual_clip=3.0, aggregation=aggregation)
    clean = clipped_surrogate(inputs)
    assert inputs.entropy is not None
    expected = gradient(clean, inputs)
    for bad in (math.nan, math.inf, -math.inf):

        def spoiled(values: Tensor, bad: float = bad) -> Tensor:
            return torch.where(inputs.response_mask, values.detach(), bad)

        fields: dict[str, Any] = {
            "logprobs": spoiled(inputs.logprobs).requires_grad_(),
            "old_logprobs": spoiled(inputs.old_logprobs),
            "advantages": spoiled(inputs.advantages),
            "entropy": spoiled(inputs.entropy),
            "bounds": ClipBounds(
                eps_lower=spoiled(inputs.bounds.eps_lower), eps_upper=spoiled(inputs.bounds.eps_upper)
            ),
        }
        dirty = dataclasses.replace(inputs, **(fields if field == "all" else {field: fields[field]}))
        output = clipped_surrogate(dirty)
        assert torch.equal(output.loss_sum, clean.loss_sum)
        assert torch.equal(gradient(output, dirty), expected)
        assert torch.equal(output.metrics.flat(), clean.metrics.flat())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("size", [0, 6])
def test_without_response_tokens_the_loss_is_a_connected_zero(aggregation: str, size: int) -> None:
    whole = tokens_only(batch(dual_clip=3.0, aggregation=aggregation), torch.arange(size))
    logprobs = torch.full((size,), -math.inf, dtype=F64, requires_grad=True)
    inputs = dataclasses.replace(whole, logprobs=logprobs, response_mask=torch.zeros(size, dtype=torch.bool))
    output = clipped_surrogate(inputs)
    assert output.loss_sum.item() == 0 and output.count.item() == 0
    assert torch.equal(gradient(output, inputs), torch.zeros(size, dtype=F64))
    assert output.metrics.names == METRICS and not any(output.metrics.means().values())


def test_a_nan_in_the_response_is_not_hidden() -> None:
    inputs = batch(dual_clip=3.0)
    first = int(inputs.response_mask.nonzero()[0])
    logprobs = inputs.logprobs.detach().clone()
    logprobs[first] = math.nan
    assert clipped_surrogate(dataclasses.replace(inputs, logprobs=logprobs)).loss_sum.isnan()


def test_sequence_aggregations_need_ids() -> None:
    with pytest.raises(AssertionError, match="seq_mean_token_sum needs"):
        clipped_surrogate(dataclasses.replace(batch(aggregation="seq_mean_token_sum"), sequence_ids=None))


def test_negative_log_likelihood() -> None:
    logprobs = torch.tensor([-1.5, -math.inf, -0.25, math.nan], dtype=F64, requires_grad=True)
    entropy = torch.tensor([0.5, math.nan, 1.0, 2.0], dtype=F64)
    mask = torch.tensor([True, False, True, False])
    output = negative_log_likelihood(logprobs, entropy, mask)
    assert output.loss_sum.item() == 1.75 and output.count.item() == 2
    assert torch.autograd.grad(output.loss_sum, logprobs)[0].tolist() == [-1, 0, -1, 0]
    assert output.metrics.names == ("entropy",) and output.metrics.means() == {"entropy": 0.75}


@pytest.mark.parametrize("size", [0, 3])
def test_negative_log_likelihood_of_nothing(size: int) -> None:
    logprobs = torch.full((size,), -math.inf, requires_grad=True)
    output = negative_log_likelihood(logprobs, torch.zeros(size), torch.zeros(size, dtype=torch.bool))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0 and output.count.item() == 0
    assert logprobs.grad is not None and torch.equal(logprobs.grad, torch.zeros(size))
