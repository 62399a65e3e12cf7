"""Entropy bonuses, KL to a reference policy, and importance weights: values, gradients, metrics, and what they need."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import loss_reference as oracle
import pytest
import torch
from loss_batch import F64, batch, in_response, leaf, tokens_of, tokens_only
from ranks import run_on_ranks
from torch import Tensor

from megatron_fec.algorithm.additions import (
    AdaptiveEntropyCoef,
    adaptive_entropy_bonus,
    entropy_bonus,
    kl,
    masked_importance,
    truncated_importance,
)
from megatron_fec.algorithm.losses import ADDITIONS
from megatron_fec.algorithm.options import check_options, defaults_of
from megatron_fec.algorithm.strategies import build_policy_loss
from megatron_fec.config import ConfigError
from megatron_fec.types import Addition, LossInputs

ESTIMATORS: list[Any] = ["k1", "k2", "k3"]
LEVELS: list[Any] = ["token", "sequence"]


def masked_losses(addition: Addition, inputs: LossInputs) -> Tensor:
    assert addition.losses is not None
    return torch.where(inputs.response_mask, addition.losses, 0.0)


def test_the_defaults() -> None:
    assert {name: defaults_of(function) for name, function in ADDITIONS.items()} == {
        "entropy_bonus": {"entropy_coef": 0.001},
        "adaptive_entropy_bonus": {},
        "kl": {"kl_coef": 0.001, "kl_estimator": "k3"},
        "truncated_importance": {"importance_cap": 2.0, "importance_level": "token"},
        "masked_importance": {"importance_cap": 2.0, "importance_level": "token"},
    }


# ---- entropy ----


def test_entropy_bonus() -> None:
    inputs = batch()
    assert inputs.entropy is not None
    losses = masked_losses(entropy_bonus(inputs, entropy_coef=0.02), inputs)
    torch.testing.assert_close(losses, in_response((-0.02 * t.h for t in tokens_of(inputs)), inputs))
    (gradients,) = torch.autograd.grad(losses.sum(), inputs.entropy)
    torch.testing.assert_close(gradients, -0.02 * inputs.response_mask.double(), rtol=1e-15, atol=0)


def test_adaptive_entropy_bonus() -> None:
    inputs = batch()
    assert inputs.entropy is not None and inputs.entropy_coefs is not None
    addition = adaptive_entropy_bonus(inputs)
    coefs = inputs.entropy_coefs.tolist()
    losses = masked_losses(addition, inputs)
    expected = in_response((-c * t.h for c, t in zip(coefs, tokens_of(inputs), strict=True)), inputs)
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)
    (gradients,) = torch.autograd.grad(losses.sum(), inputs.entropy)
    torch.testing.assert_close(gradients, in_response((-c for c in coefs), inputs), rtol=1e-15, atol=0)
    assert torch.equal(addition.metrics["entropy_coef"], inputs.entropy_coefs)


def test_the_adaptive_coefficient_by_hand() -> None:
    rule = AdaptiveEntropyCoef(accuracy_target=0.5, entropy_target_ratio=0.5, alpha_step=0.1, alpha_max=0.03)
    accuracies = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64)
    alphas = []
    for entropy in (2.0, 1.2, 0.9, 0.8, 0.5, 0.5, 1.25):  # H* = 1
        coefs = rule.coefs(entropy, accuracies)
        alphas.append(rule.alpha)
        assert coefs.tolist() == pytest.approx([rule.alpha, rule.alpha / 2, 0, 0])
    assert alphas == pytest.approx([0, 0, 0.01, 0.03, 0.03, 0.03, 0.005])


def test_the_adaptive_coefficient_resumes() -> None:
    whole, first, second = AdaptiveEntropyCoef(), AdaptiveEntropyCoef(), AdaptiveEntropyCoef()
    entropies, accuracies = [1.5, 0.4, 0.3, 0.6, 0.2], torch.tensor([0.1, 0.4])
    expected = [whole.coefs(h, accuracies) for h in entropies]
    for h in entropies[:2]:
        first.coefs(h, accuracies)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"alpha": pytest.approx(0.001 * 0.35), "entropy_start": 1.5}
    for h, wanted in zip(entropies[2:], expected[2:], strict=True):
        assert torch.equal(second.coefs(h, accuracies), wanted)


def test_the_settings_of_the_adaptive_coefficient_are_options() -> None:
    functions = {"adaptive_entropy_bonus": AdaptiveEntropyCoef}
    check_options(functions, {"alpha_max": 0.02, "accuracy_target": 0.6}, key="o")
    with pytest.raises(ConfigError, match=r"o\.accuracy_target=1\.5 must be between 0 and 1"):
        check_options(functions, {"accuracy_target": 1.5}, key="o")
    with pytest.raises(ConfigError, match=r"o\.alpha is not read"):
        check_options(functions, {"alpha": 0.5}, key="o")


# ---- KL ----


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_against_the_oracle(estimator: Any) -> None:
    inputs = batch()
    assert inputs.reference_logprobs is not None
    far = inputs.reference_logprobs.clone()
    far[[0, 1]] += torch.tensor([30.0, -30.0], dtype=F64)  # beyond the clamp
    inputs = dataclasses.replace(inputs, reference_logprobs=far)
    addition = kl(inputs, kl_coef=0.1, kl_estimator=estimator)
    losses = masked_losses(addition, inputs)
    values, slopes = zip(*(oracle.kl(t, estimator) for t in tokens_of(inputs)), strict=True)
    torch.testing.assert_close(losses, in_response((0.1 * v for v in values), inputs), rtol=1e-12, atol=1e-15)
    (gradients,) = torch.autograd.grad(losses.sum(), inputs.logprobs)
    torch.testing.assert_close(
        gradients, in_response((0.1 * s for s in slopes), inputs), rtol=1e-12, atol=1e-15
    )
    metric = torch.where(inputs.response_mask, addition.metrics["reference_kl"], 0.0)
    torch.testing.assert_close(metric, in_response(values, inputs), rtol=1e-12, atol=1e-15)
    assert not metric.requires_grad


def on_policy_kl(estimator: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean value, mean gradient over z, p, reference) of a softmax policy, exactly, over all tokens it may sample."""
    z = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=F64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    p = z.softmax(0).detach()
    inputs = tokens_only(batch(), torch.arange(4))
    inputs = dataclasses.replace(
        inputs,
        logprobs=z.log_softmax(0),
        reference_logprobs=reference.log(),
        response_mask=torch.ones(4, dtype=torch.bool),
    )
    losses = kl(inputs, kl_coef=1.0, kl_estimator=estimator).losses
    assert losses is not None
    return (p * losses).sum().detach(), torch.autograd.grad((p * losses).sum(), z)[0], z, reference


def test_what_each_estimator_estimates_and_where_its_gradient_leads() -> None:
    values, gradients = {}, {}
    for estimator in ESTIMATORS:
        values[estimator], gradients[estimator], z, reference = on_policy_kl(estimator)
    lp = z.log_softmax(0)
    to_reference = (lp.exp() * (lp - reference.log())).sum()  # KL(policy || reference)
    from_reference = (reference * (reference.log() - lp)).sum()
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)
    close(values["k1"], to_reference.detach())
    close(values["k3"], to_reference.detach())
    close(gradients["k1"], torch.zeros(4, dtype=F64))
    close(gradients["k2"], torch.autograd.grad(to_reference, z, retain_graph=True)[0])
    close(gradients["k3"], torch.autograd.grad(from_reference, z)[0])


# ---- importance ----


def expected_weights(inputs: LossInputs, level: str, name: str, cap: float) -> tuple[Tensor, Tensor]:
    tokens = tokens_of(inputs)
    ratios = [oracle.importance(t, tokens, level) for t in tokens]
    if name == "truncated_importance":
        weights, capped = [min(w, cap) for w in ratios], [w > cap for w in ratios]
    else:
        capped = [w > cap or w < 1 / cap for w in ratios]
        weights = [0.0 if out else w for w, out in zip(ratios, capped, strict=True)]
    return in_response(weights, inputs), in_response(map(float, capped), inputs)


@pytest.mark.parametrize("name", ["truncated_importance", "masked_importance"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("cap", [1.5, 50.0])
def test_importance_against_the_oracle(name: str, level: str, cap: float) -> None:
    inputs = batch()
    assert inputs.rollout_logprobs is not None
    engine = inputs.rollout_logprobs.clone()
    for i, target in ((0, 2.0), (1, 0.2), (3, -2.0)):  # logs of the products
        own = inputs.response_mask & (inputs.sequence_ids == i)
        engine[own] += (inputs.old_logprobs - engine)[own].mean() - target / own.sum()
    inputs = dataclasses.replace(inputs, rollout_logprobs=engine)
    addition = ADDITIONS[name](inputs, importance_cap=cap, importance_level=level)
    weights, capped = expected_weights(inputs, level, name, cap)
    assert addition.weights is not None and addition.losses is None and not addition.weights.requires_grad
    mask = inputs.response_mask
    torch.testing.assert_close(torch.where(mask, addition.weights, 0.0), weights, rtol=1e-12, atol=0)
    reported = {name: torch.where(mask, value.double(), 0.0) for name, value in addition.metrics.items()}
    assert list(reported) == ["importance_weight", "importance_weight_squared", "importance_capped"]
    torch.testing.assert_close(reported["importance_weight"], weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(reported["importance_weight_squared"], weights**2, rtol=1e-12, atol=0)
    assert torch.equal(reported["importance_capped"], capped)
    if cap == 1.5:
        assert 0 < capped.sum() < mask.sum()


def test_at_the_same_logprobs_every_weight_is_one() -> None:
    inputs = batch()
    inputs = dataclasses.replace(inputs, rollout_logprobs=inputs.old_logprobs)
    for level in LEVELS:
        for function in (truncated_importance, masked_importance):
            weights = function(inputs, importance_level=level).weights
            assert weights is not None and torch.equal(weights, torch.ones_like(weights))


def test_a_response_that_the_engine_never_gives_does_not_overflow() -> None:
    inputs = batch(dtype=torch.float32)
    assert inputs.rollout_logprobs is not None
    for shift in (-900.0, 900.0):
        far = dataclasses.replace(inputs, rollout_logprobs=inputs.rollout_logprobs + shift)
        for level in LEVELS:
            for function, low, high in ((truncated_importance, 0.0, 2.0), (masked_importance, 0.0, 0.0)):
                weights = function(far, importance_level=level).weights
                assert weights is not None and weights[inputs.response_mask].isfinite().all()
                expected = high if shift < 0 else low
                assert weights[inputs.response_mask].tolist() == pytest.approx([expected] * 107, abs=1e-8)


@pytest.mark.parametrize("function", [truncated_importance, masked_importance])
def test_a_sequences_weight_where_ranks_share_it(function: Any) -> None:
    whole = batch()
    weigh = partial(function, importance_level="sequence", importance_cap=50.0)
    expected = weigh(whole).weights
    places = [torch.arange(rank, len(whole.logprobs), 2) for rank in range(2)]

    def job(rank: int) -> Tensor:
        part = leaf(tokens_only(whole, places[rank]))
        return weigh(dataclasses.replace(part, context_group=torch.distributed.group.WORLD)).weights

    for own, got in zip(places, run_on_ranks(2, job), strict=True):
        mask = whole.response_mask[own]
        torch.testing.assert_close(got[mask], expected[own][mask], rtol=1e-12, atol=0)


# ---- together ----


def test_a_loss_with_additions_is_weighed_then_extended() -> None:
    inputs = batch(aggregation="seq_mean_token_mean")
    options = {"entropy_coef": 0.02, "kl_coef": 0.1, "importance_cap": 1.5}
    build = partial(build_policy_loss, options=options)
    output = build("clip+entropy_bonus+truncated_importance+kl")(inputs)
    weights = truncated_importance(inputs, importance_cap=1.5).weights
    clip = build("clip")(dataclasses.replace(inputs, weights=weights))
    assert not torch.allclose(clip.loss_sum, build("clip")(inputs).loss_sum)
    none = dataclasses.replace(inputs, advantages=torch.zeros_like(inputs.advantages))
    bonus, divergence = build("clip+entropy_bonus")(none), build("clip+kl")(none)  # not weighed
    total = clip.loss_sum + bonus.loss_sum + divergence.loss_sum
    torch.testing.assert_close(output.loss_sum, total, rtol=1e-12, atol=0)
    assert output.count == clip.count
    h = [math.fsum(t.h for t in tokens_of(inputs) if t.counts and t.sequence == i) for i in (0, 1, 3)]
    expected = -0.02 * sum(x / n for x, n in zip(h, (25, 32, 50), strict=True))
    assert bonus.loss_sum.item() == pytest.approx(expected, rel=1e-12)
    assert {"importance_weight", "reference_kl", "entropy"} <= set(output.metrics.names)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("entropy_bonus", "entropy"),
        ("adaptive_entropy_bonus", "entropy_coefs"),
        ("kl", "reference_logprobs"),
        ("truncated_importance", "rollout_logprobs"),
        ("masked_importance", "rollout_logprobs"),
    ],
)
def test_what_an_addition_needs(name: str, field: str) -> None:
    empty: dict[str, Any] = {field: None}
    with pytest.raises(ValueError, match=rf"{name} needs LossInputs\.{field}, which is None"):
        ADDITIONS[name](dataclasses.replace(batch(), **empty))
