"""The clipped surrogate against the oracle, values and gradients, and what it reduces to."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import reference
import torch
from loss_batch import F64, batch, gradient, in_response, token_losses

from megatron_fec.algorithm.losses import AGGREGATIONS, clipped_surrogate
from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds
from megatron_fec.types import BlendWeights, ClipBounds, LossInputs

WEIGHTS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.7, 0.4)]


def reference_tokens(
    inputs: LossInputs, weights: tuple[float, float], dual_clip: float | None
) -> list[tuple[float, float]]:
    """(loss, gradient) of every token; the bounds, too, are computed in float64 and not taken from the inputs."""
    columns = (inputs.logprobs.tolist(), inputs.old_logprobs.tolist(), inputs.advantages.tolist())
    return [
        reference.clip_loss(lp, old, a, *reference.bounds(math.exp(lp), *weights), dual_clip)
        for lp, old, a in zip(*columns, strict=True)
    ]


def one_side(advantage: float, log_ratio: float, logprob: float = -0.3) -> LossInputs:
    """Three equal tokens."""
    lp = torch.full((3,), logprob, dtype=F64, requires_grad=True)
    return LossInputs(
        logprobs=lp,
        old_logprobs=lp.detach() - log_ratio,
        advantages=torch.full((3,), advantage, dtype=F64),
        response_mask=torch.ones(3, dtype=torch.bool),
        bounds=clip_bounds(lp.exp(), BlendWeights(upper=1.0, lower=1.0), lines=ThresholdLines()),
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_float64_against_reference(
    weights: tuple[float, float], dual_clip: float | None, aggregation: str
) -> None:
    inputs = batch(weights, aggregation=aggregation)
    assert inputs.sequence_ids is not None
    losses, gradients = zip(*reference_tokens(inputs, weights, dual_clip), strict=True)
    loss_sum, count, shares = reference.aggregate(
        losses, inputs.response_mask.tolist(), inputs.sequence_ids.tolist(), aggregation, longest=50
    )
    output = clipped_surrogate(inputs, dual_clip=dual_clip)
    assert output.loss_sum.item() == pytest.approx(loss_sum, rel=1e-12)
    assert output.count.item() == count and not output.count.is_floating_point()
    expected = torch.tensor([g * w for g, w in zip(gradients, shares, strict=True)], dtype=F64)
    torch.testing.assert_close(gradient(output, inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_each_token_alone_against_reference(dual_clip: float | None) -> None:
    inputs = batch((1.0, 1.0))  # the sum above would hide a small token behind a large one
    losses, _ = token_losses(partial(clipped_surrogate, dual_clip=dual_clip), inputs)
    expected = in_response((loss for loss, _ in reference_tokens(inputs, (1.0, 1.0), dual_clip)), inputs)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_float32_against_reference(weights: tuple[float, float]) -> None:
    inputs = batch(weights, dtype=torch.float32)
    output = clipped_surrogate(inputs, dual_clip=3.0)
    losses, gradients = zip(*reference_tokens(inputs, weights, 3.0), strict=True)
    expected = in_response(gradients, inputs)
    assert output.loss_sum.item() == pytest.approx(in_response(losses, inputs).sum().item(), rel=1e-6)
    torch.testing.assert_close(gradient(output, inputs).double(), expected, rtol=1e-6, atol=1e-6)


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
        inputs = batch(weights, log_ratios=[0.0] * 12)
        output = clipped_surrogate(inputs, dual_clip=3.0)
        assert torch.equal(gradient(output, inputs), -inputs.advantages * inputs.response_mask)
        means = output.metrics.means()
        for name in ("clip_fraction_upper", "clip_fraction_lower", "dual_clip_fraction", "ratio_moved"):
            assert means[name] == 0
        assert means["approx_kl"] == means["log_ratio_abs"] == 0


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
    inputs = one_side(0.0, log_ratio)
    output = clipped_surrogate(inputs, dual_clip=3.0)
    assert output.loss_sum.item() == 0 and torch.equal(gradient(output, inputs), torch.zeros(3, dtype=F64))
    means = output.metrics.means()
    assert means["clip_fraction_upper"] == means["clip_fraction_lower"] == means["dual_clip_fraction"] == 0


def test_the_log_ratio_clamp_stops_value_and_gradient() -> None:
    inputs = dataclasses.replace(one_side(-1.0, 0.6), log_ratio_clamp=0.5)
    output = clipped_surrogate(inputs)
    assert output.loss_sum.item() == pytest.approx(3 * math.exp(0.5), rel=1e-12)
    assert torch.equal(gradient(output, inputs), torch.zeros(3, dtype=F64))
