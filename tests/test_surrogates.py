"""Each loss of one token or one response against the oracle, value and gradient of every token, and its known values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import loss_reference as oracle
import pytest
import reference
import torch
from loss_batch import F64, batch, gradient, in_response, leaf, parts_of, token_losses, tokens_of, tokens_only
from loss_reference import Pair, Token
from ranks import run_on_ranks
from torch import Tensor

from megatron_fec.algorithm.aggregation import AGGREGATIONS
from megatron_fec.algorithm.losses import POLICY_LOSSES
from megatron_fec.algorithm.options import defaults_of
from megatron_fec.algorithm.surrogates import (
    ce_gppo,
    cispo,
    clipped_surrogate,
    dcpo,
    gspo,
    region_study,
    reinforce,
    sapo,
)
from megatron_fec.types import LossInputs, LossOutput

Loss = Callable[..., LossOutput]
REGIONS = ["E1", "E2", "E3", "E4"]
ROWS: list[tuple[Loss, dict[str, Any], Callable[[Token], Pair]]] = [
    (clipped_surrogate, {}, lambda t: oracle.clip(t, t.low, t.up, None)),
    (clipped_surrogate, {"dual_clip": 3.0}, lambda t: oracle.clip(t, t.low, t.up, 3.0)),
    (reinforce, {}, oracle.reinforce),
    (sapo, {}, lambda t: oracle.sapo(t, 1.0, 1.05)),
    (sapo, {"tau_positive": 0.6, "tau_negative": 2.0}, lambda t: oracle.sapo(t, 0.6, 2.0)),
    (cispo, {}, lambda t: oracle.cispo(t, 0.0, 1.28)),
    (cispo, {"ratio_min": 0.8, "ratio_max": 2.0}, lambda t: oracle.cispo(t, 0.8, 2.0)),
    (ce_gppo, {}, lambda t: oracle.ce_gppo(t, 0.75, 1.0, 10.0)),
    (
        ce_gppo,
        {"gradient_kept_lower": 0.5, "gradient_kept_upper": 0.9, "dual_clip": None},
        lambda t: oracle.ce_gppo(t, 0.5, 0.9, None),
    ),
    (dcpo, {}, lambda t: oracle.dcpo(t, 0.16, 0.2, 10.0, 10.0)),
    (
        dcpo,
        {"dcpo_eps_lower": 0.02, "dcpo_eps_upper": 0.28, "dcpo_ratio_max": 2.5, "dual_clip": None},
        lambda t: oracle.dcpo(t, 0.02, 0.28, 2.5, None),
    ),
    *(
        (
            region_study,
            {"region": name, "mode": mode},
            lambda t, name=name, mode=mode: oracle.region(t, name, mode)[0],
        )
        for name in REGIONS
        for mode in ("only", "extend")
    ),
]


def row_name(value: object) -> str | None:
    return getattr(value, "__name__", None) or (
        ",".join(map(str, value.values())) if isinstance(value, dict) else ""
    )


@pytest.mark.parametrize(("loss", "options", "expected"), ROWS, ids=row_name)
def test_every_token_against_the_oracle(
    loss: Loss, options: dict[str, Any], expected: Callable[[Token], Pair]
) -> None:
    inputs = batch((0.0, 0.3))
    pairs = [expected(t) for t in tokens_of(inputs)]
    losses, gradients = token_losses(partial(loss, **options), inputs)
    torch.testing.assert_close(losses, in_response([p[0] for p in pairs], inputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, in_response([p[1] for p in pairs], inputs), rtol=1e-12, atol=1e-12)


def test_the_defaults_are_those_of_the_sources() -> None:
    assert {
        name: defaults_of(POLICY_LOSSES[name]) for name in ("gspo", "sapo", "cispo", "ce_gppo", "dcpo")
    } == {
        "gspo": {"sequence_eps_lower": 3e-4, "sequence_eps_upper": 4e-4},
        "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
        "cispo": {"ratio_min": 0.0, "ratio_max": 1.28},
        "ce_gppo": {"gradient_kept_lower": 0.75, "gradient_kept_upper": 1.0, "dual_clip": 10.0},
        "dcpo": {"dcpo_eps_lower": 0.16, "dcpo_eps_upper": 0.2, "dcpo_ratio_max": 10.0, "dual_clip": 10.0},
    }


def one_token(log_ratio: float, advantage: float, logprob: float = -0.3) -> LossInputs:
    inputs = batch()
    ones = torch.ones_like(inputs.logprobs)
    return dataclasses.replace(
        inputs,
        logprobs=(logprob * ones).requires_grad_(),
        old_logprobs=(logprob - log_ratio) * ones,
        advantages=advantage * ones,
        response_mask=torch.arange(len(ones)) == 0,
    )


def value_and_gradient(loss: Callable[[LossInputs], LossOutput], inputs: LossInputs) -> tuple[float, float]:
    losses, gradients = token_losses(loss, inputs)
    return losses[0].item(), gradients[0].item()


# ---- GSPO ----

WIDE = {"sequence_eps_lower": 0.2, "sequence_eps_upper": 0.2}


def gspo_batch(**settings: Any) -> LossInputs:
    """One advantage a response; sequence 0 is clipped above, 1 below, 3 not."""
    inputs = batch(log_ratios=[0.1, -0.2, 0.3, -0.05] * 4, **settings)
    assert inputs.sequence_ids is not None
    shift = torch.tensor([0.3, -0.4, 0.0, 0.02, 0.0], dtype=F64)[inputs.sequence_ids]
    advantages = torch.tensor([0.7, -1.3, 0.4, 0.9, 0.0], dtype=F64)[inputs.sequence_ids]
    return dataclasses.replace(inputs, old_logprobs=inputs.old_logprobs - shift, advantages=advantages)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gspo_against_the_oracle(aggregation: str) -> None:
    inputs = gspo_batch(aggregation=aggregation)
    assert inputs.sequence_ids is not None
    mask = inputs.response_mask.tolist()
    losses, slopes = zip(*oracle.gspo(tokens_of(inputs), 0.2, 0.2), strict=True)
    output = gspo(inputs, **WIDE)
    means = output.metrics.means()
    assert means["clip_fraction_upper"] > 0 and means["clip_fraction_lower"] > 0
    assert means["eps_upper_mean"] == means["eps_lower_mean"] == pytest.approx(0.2)
    loss_sum, count, shares = reference.aggregate(
        losses, mask, inputs.sequence_ids.tolist(), aggregation, longest=50
    )
    assert output.loss_sum.item() == pytest.approx(loss_sum, rel=1e-12) and output.count.item() == count
    expected = torch.tensor([slope * share for slope, share in zip(slopes, shares, strict=True)], dtype=F64)
    assert expected.any()
    torch.testing.assert_close(gradient(output, inputs), expected, rtol=1e-12, atol=1e-12)


def test_gspo_has_the_gradient_of_the_papers_sequence_form() -> None:
    inputs = gspo_batch(aggregation="seq_mean_token_mean")
    logprobs = inputs.logprobs.detach().requires_grad_()
    total = torch.zeros((), dtype=F64)
    for i in (0, 1, 3):
        own = inputs.response_mask & (inputs.sequence_ids == i)
        s = (logprobs - inputs.old_logprobs)[own].mean().exp()
        a = inputs.advantages[own][0]
        total = total - torch.minimum(s * a, s.clamp(0.8, 1.2) * a)
    output = gspo(inputs, **WIDE)
    torch.testing.assert_close(output.loss_sum, total, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(total, logprobs)[0]
    torch.testing.assert_close(gradient(output, inputs), expected, rtol=1e-12, atol=1e-14)


def test_gspo_clamps_the_ratio_of_a_response_that_ran_away() -> None:
    e9, e10 = math.exp(9), math.exp(10)
    assert value_and_gradient(gspo, one_token(11.0, -2.0)) == pytest.approx((2 * e10, 0.0))
    assert value_and_gradient(gspo, one_token(9.0, -2.0)) == pytest.approx((2 * e9, 2 * e9))
    assert value_and_gradient(gspo, one_token(11.0, 2.0)) == pytest.approx((-2 * 1.0004, 0.0))


@pytest.mark.parametrize("size", [2, 3])
def test_gspo_of_sequences_that_are_split_over_ranks(size: int) -> None:
    whole = gspo_batch()
    ids = whole.sequence_ids
    assert ids is not None
    # Rank 0 alone holds padding; the last rank holds nothing of sequence 3, as happens to a short one.
    owner = torch.arange(len(ids)) % size
    owner[ids == -1] = 0
    owner[(ids == 3) & (owner == size - 1)] = 0
    places = [(owner == rank).nonzero().flatten() for rank in range(size)]
    assert not (ids[places[-1]] == 3).any() and not (ids[places[-1]] == -1).any()

    def job(rank: int) -> tuple[float, Tensor, Tensor]:
        inputs = dataclasses.replace(
            leaf(tokens_only(whole, places[rank])), context_group=torch.distributed.group.WORLD
        )
        output = gspo(inputs, **WIDE)
        return output.loss_sum.item(), gradient(output, inputs), output.metrics.flat()

    loss_sums, gradients, metrics = zip(*run_on_ranks(size, job), strict=True)
    output = gspo(whole, **WIDE)
    assert sum(loss_sums) == pytest.approx(output.loss_sum.item(), rel=1e-12)
    torch.testing.assert_close(sum(metrics), output.metrics.flat(), rtol=1e-12, atol=1e-12)
    expected = gradient(output, whole)
    for own, got in zip(places, gradients, strict=True):
        torch.testing.assert_close(got, expected[own], rtol=1e-12, atol=1e-14)


# ---- known values and traps ----


def test_sapo_at_ratio_one_has_the_plain_gradient_and_another_value() -> None:
    assert value_and_gradient(sapo, one_token(0.0, 0.7)) == pytest.approx((-2 * 0.7, -0.7))
    assert value_and_gradient(sapo, one_token(0.0, -1.3)) == pytest.approx((2 * 1.3 / 1.05, 1.3))
    means = sapo(batch()).metrics.means()
    assert means["clip_fraction_upper"] == means["clip_fraction_lower"] == means["dual_clip_fraction"] == 0


def test_cispo_has_a_cap_no_floor_and_always_a_gradient() -> None:
    assert value_and_gradient(cispo, one_token(math.log(5.0), 2.0)) == pytest.approx(
        (2 * 1.28 * 0.3, -2 * 1.28)
    )
    assert value_and_gradient(cispo, one_token(math.log(0.1), -2.0)) == pytest.approx((-0.06, 0.2))
    assert value_and_gradient(partial(cispo, ratio_min=1.0), one_token(-3.0, -2.0))[1] == 2.0
    inputs = batch()
    moves = (gradient(cispo(inputs), inputs) != 0) == (inputs.response_mask & (inputs.advantages != 0))
    assert moves.all()
    means = cispo(inputs).metrics.means()
    tokens = [t for t in tokens_of(inputs) if t.counts]
    assert means["ratio_capped"] == pytest.approx(sum(t.a != 0 and t.r > 1.28 for t in tokens) / len(tokens))
    assert means["clip_fraction_upper"] == 0


def test_ce_gppo_keeps_a_gradient_beyond_the_bounds() -> None:
    inputs = dataclasses.replace(one_token(math.log(0.5), -2.0), bounds=batch((0.0, 0.0)).bounds)
    assert value_and_gradient(ce_gppo, inputs) == pytest.approx((2 * 0.75 * 0.8, 2 * 0.75 * 0.8))
    inputs = dataclasses.replace(one_token(math.log(2.0), 2.0), bounds=batch((0.0, 0.0)).bounds)
    assert value_and_gradient(ce_gppo, inputs) == pytest.approx((-2 * 1.2, -2 * 1.2))
    assert value_and_gradient(ce_gppo, one_token(math.log(11.0), -2.0)) == (20.0, 0.0)
    means = ce_gppo(batch()).metrics.means()
    clip = clipped_surrogate(batch(), dual_clip=10.0).metrics.means()
    assert means == clip and min(means[f"clip_fraction_{side}"] for side in ("upper", "lower")) > 0


@pytest.mark.parametrize(
    ("q", "lowest", "highest"),
    [
        (1.0, 0.5 + 0.5 * 0.6, 0.5 + 0.5 * math.sqrt(1.8)),
        (0.64, 0.5, 1.25),  # 4 * 0.16 / 0.64 = 1, 1 + 4 * 0.2 / 0.64 = 2.25
        (0.1, 0.5, 2.0),
        (1e-3, 0.5, 10.0),  # 14.65 without the cap
        (0.0, 0.5, 10.0),
    ],
)
def test_dcpo_has_wider_bounds_for_rarer_tokens(q: float, lowest: float, highest: float) -> None:
    means = dcpo(one_token(0.0, 1.0, math.log(q) if q > 0 else -800.0)).metrics.means()
    assert 1 - means["eps_lower_mean"] == pytest.approx(lowest) and 1 + means[
        "eps_upper_mean"
    ] == pytest.approx(highest)


@pytest.mark.parametrize("mode", ["only", "extend"])
@pytest.mark.parametrize("name", REGIONS)
def test_a_region_and_its_share(name: Any, mode: Any) -> None:
    inputs = batch((0.0, 0.0))
    tokens = [t for t in tokens_of(inputs) if t.counts]
    inside = [oracle.region(t, name, mode)[1] for t in tokens]
    assert 0 < sum(inside) < len(inside)
    output = region_study(inputs, region=name, mode=mode)
    assert output.metrics.means()["region_share"] == pytest.approx(sum(inside) / len(inside), rel=1e-12)
    grads = gradient(output, inputs)[inputs.response_mask]
    for t, is_inside, g in zip(tokens, inside, grads.tolist(), strict=True):
        if is_inside:
            assert g == pytest.approx(-t.a * t.r, rel=1e-12)
        studied = (t.a > 0 and t.r > 1) if name in ("E1", "E2") else (t.a < 0 and t.r < 1)
        if mode == "only" and studied and not is_inside:
            assert g == 0


def test_only_leaves_alone_what_moved_by_the_noise_of_the_kernel() -> None:
    loss = partial(region_study, region="E2", mode="only")
    assert value_and_gradient(loss, one_token(1e-6, 1.0))[1] == pytest.approx(-1, rel=1e-5)
    assert value_and_gradient(loss, one_token(1e-4, 1.0))[1] == 0


def test_a_response_of_one_micro_batch_does_not_see_another() -> None:
    inputs = gspo_batch()
    whole = gspo(inputs, **WIDE)
    parts = [gspo(part, **WIDE) for part in parts_of(inputs, [[3, -1], [0], [1, 2]])]
    loss_sum = torch.stack([part.loss_sum for part in parts]).sum()
    torch.testing.assert_close(loss_sum, whole.loss_sum, rtol=1e-12, atol=0)
