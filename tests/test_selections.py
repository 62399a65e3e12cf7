"""The losses that choose among tokens: what they choose, from which tokens, and what the chosen ones get."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import loss_reference as oracle
import pytest
import reference
import torch
from loss_batch import (
    F64,
    LOG_RATIOS,
    OPTIONS,
    batch,
    gradient,
    in_response,
    marked,
    parts_of,
    token_losses,
    tokens_of,
    tokens_only,
    update_tokens,
)
from torch import Tensor

from megatron_fec.algorithm.losses import MARKS, POLICY_LOSSES
from megatron_fec.algorithm.options import defaults_of, options_of
from megatron_fec.algorithm.selections import (
    CHOSEN,
    archer,
    archer_marks,
    clip_cov,
    clip_cov_marks,
    high_entropy,
    high_entropy_marks,
    kl_cov,
    kl_cov_marks,
    steer,
    steer_marks,
)
from megatron_fec.config import ConfigError
from megatron_fec.types import LossInputs, UpdateTokens

COV: dict[str, Any] = OPTIONS["clip_cov"]
MODERATE = [
    x if abs(x) < 20 else x / 100 for x in LOG_RATIOS
]  # a ratio of e^20 would be the only token that STEER sees


def response(inputs: LossInputs) -> list[oracle.Token]:
    return [t for t in tokens_of(inputs) if t.counts]


def shuffled(tokens: UpdateTokens, order: Tensor) -> UpdateTokens:
    fields = {
        name: getattr(tokens, name)[order] for name in ("logprobs", "old_logprobs", "advantages", "entropy")
    }
    bounds = dataclasses.replace(
        tokens.bounds, eps_lower=tokens.bounds.eps_lower[order], eps_upper=tokens.bounds.eps_upper[order]
    )
    assert tokens.alignment is not None
    return dataclasses.replace(
        tokens,
        **fields,
        bounds=bounds,
        alignment=tokens.alignment[order],
        sequence_ids=tokens.sequence_ids[order],
    )


# ---- marks ----


def test_clip_cov_draws_among_the_candidates() -> None:
    inputs = batch((0.0, 0.3))
    tokens = response(inputs)
    marks = clip_cov_marks(update_tokens(inputs), **COV)
    candidates = [
        0.05 < cov < 1.5 and not t.clipped_upper and not t.clipped_lower
        for t, cov in zip(tokens, oracle.covariances(tokens), strict=True)
    ]
    assert (marks > 0).tolist() == candidates
    assert (marks == CHOSEN).sum().item() == int(0.1 * len(tokens)) < sum(candidates)
    # Some are left out because a bound clips them, some as extremes.
    high = [cov for cov in oracle.covariances(tokens) if cov > 0.05]
    assert sum(candidates) < sum(cov < 1.5 for cov in high) < len(high)


def test_clip_cov_draws_by_the_seed() -> None:
    tokens = update_tokens(batch())
    marks = clip_cov_marks(tokens, **COV)
    assert torch.equal(clip_cov_marks(tokens, **COV), marks)
    others = [clip_cov_marks(dataclasses.replace(tokens, seed=seed), **COV) for seed in range(20)]
    assert len({tuple(other.tolist()) for other in others}) > 10
    ever = torch.stack(others).amax(0)
    assert torch.equal(ever > 0, marks > 0) and (ever == CHOSEN).sum() > 2 * (marks == CHOSEN).sum()


@pytest.mark.parametrize(("share", "low", "chosen"), [(1e-6, 0.05, 1), (0.99, 0.05, None), (0.1, 4.9, 0)])
def test_clip_cov_takes_at_least_one_and_at_most_all(share: float, low: float, chosen: int | None) -> None:
    marks = clip_cov_marks(update_tokens(batch()), clip_cov_share=share, clip_cov_low=low, clip_cov_high=5.0)
    assert (marks == CHOSEN).sum().item() == ((marks > 0).sum().item() if chosen is None else chosen)


@pytest.mark.parametrize(("share", "number"), [(0.1, 10), (1e-6, 1), (0.5, 53)])
def test_kl_cov_takes_the_highest_covariances(share: float, number: int) -> None:
    inputs = batch()
    covariances = oracle.covariances(response(inputs))
    threshold = sorted(covariances, reverse=True)[number - 1]
    marks = kl_cov_marks(update_tokens(inputs), kl_cov_share=share)
    assert marks.tolist() == [float(cov >= threshold) for cov in covariances] and marks.sum() == number


def test_kl_cov_takes_the_earlier_of_equals() -> None:
    tokens = update_tokens(batch())
    equal = dataclasses.replace(tokens, advantages=torch.zeros_like(tokens.advantages))
    assert kl_cov_marks(equal, kl_cov_share=0.03).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("share", [0.2, 0.01, 0.99, 0.37])
@pytest.mark.parametrize("ties", [False, True])
def test_high_entropy_is_at_least_the_quantile(share: float, ties: bool) -> None:
    tokens = update_tokens(batch())
    if ties:
        tokens = dataclasses.replace(tokens, entropy=(tokens.entropy * 3).floor())
    entropy = tokens.entropy.tolist()
    threshold = oracle.quantile(entropy, 1 - share)
    assert high_entropy_marks(tokens, high_entropy_share=share).tolist() == [
        float(h >= threshold - 1e-9) for h in entropy
    ]


@pytest.mark.parametrize("quantile", [0.8, 0.5, 0.05, 0.97])
@pytest.mark.parametrize("ties", [False, True])
def test_archer_is_above_the_quantile_of_its_response(quantile: float, ties: bool) -> None:
    inputs = batch()
    assert inputs.entropy is not None
    if ties:
        inputs = dataclasses.replace(inputs, entropy=(inputs.entropy.detach() * 3).floor())
    expected = []
    for t in response(inputs):
        own = [o.h for o in response(inputs) if o.sequence == t.sequence]
        expected.append(float(t.h > oracle.quantile(own, quantile) + 1e-9))
    assert archer_marks(update_tokens(inputs), archer_quantile=quantile).tolist() == expected


def test_the_rank_of_a_quantile_is_not_rounded() -> None:
    assert 0.29 * 100 < 29
    tokens = update_tokens(batch())
    first = dataclasses.replace(
        shuffled(tokens, torch.arange(101)), entropy=torch.arange(101.0), sequence_ids=torch.zeros(101).long()
    )
    assert archer_marks(first, archer_quantile=0.29).sum() == 101 - 30
    assert high_entropy_marks(first, high_entropy_share=0.71).sum() == 101 - 29


@pytest.mark.parametrize("form", ["code", "paper", "exact"])
@pytest.mark.parametrize("how", ["exp", "linear"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_steer_weights_against_the_oracle(form: Any, how: Any, scale: float) -> None:
    inputs = batch(log_ratios=MODERATE)
    inputs = dataclasses.replace(inputs, advantages=scale * inputs.advantages)
    expected = oracle.steer_weights(response(inputs), form, how, 0.7, 1.3)
    weights = steer_marks(
        update_tokens(inputs), form=form, weight_map=how, weight_min=0.7, weight_max=1.3
    ).tolist()
    assert weights == pytest.approx(expected, rel=1e-6)
    if scale == 1.0:
        assert min(weights) == pytest.approx(0.7) and max(weights) == pytest.approx(
            1.0 if how == "exp" else 1.3
        )


def test_the_forms_of_steer_differ() -> None:
    tokens = update_tokens(batch(log_ratios=MODERATE))
    forms: list[Any] = ["code", "paper", "exact"]
    code, paper, exact = (steer_marks(tokens, form=form) for form in forms)
    assert not torch.allclose(code, paper, atol=1e-3) and not torch.allclose(code, exact, atol=1e-3)
    assert torch.equal(steer_marks(tokens), code)


def test_exact_steer_needs_the_alignment() -> None:
    tokens = dataclasses.replace(update_tokens(batch()), alignment=None)
    with pytest.raises(ValueError, match=r"steer with form=exact needs LossInputs\.alignment"):
        steer_marks(tokens, form="exact")


@pytest.mark.parametrize("name", MARKS)
def test_marks_of_nothing_are_nothing(name: str) -> None:
    marks = MARKS[name](shuffled(update_tokens(batch()), torch.arange(0)))
    assert marks.shape == (0,) and marks.dtype == torch.float32


@pytest.mark.parametrize("name", MARKS)
def test_marks_are_fp32_without_gradient(name: str) -> None:
    marks = MARKS[name](update_tokens(batch()))
    assert marks.dtype == torch.float32 and not marks.requires_grad


# ---- losses ----


def expected_pairs(name: str, inputs: LossInputs) -> list[oracle.Pair]:
    """Of every token; the choice itself is that of the marks, which the tests above hold against the oracle."""
    assert inputs.marks is not None
    pairs = []
    for t, mark in zip(tokens_of(inputs), inputs.marks.tolist(), strict=True):
        if name == "kl_cov":
            pairs.append(oracle.kl_cov(t, mark > 0, 1.0))
        elif name == "archer":
            eps = 0.5 if mark > 0 else 0.2
            pairs.append(oracle.clip(t, eps, eps, None))
        else:
            clipped = oracle.clip(
                t, t.low, t.up, {"clip_cov": None, "high_entropy": 3.0, "steer": 10.0}[name]
            )
            factor = {"clip_cov": float(mark != CHOSEN), "high_entropy": float(mark > 0), "steer": mark}[name]
            pairs.append((factor * clipped[0], factor * clipped[1]))
    return pairs


@pytest.mark.parametrize("name", MARKS)
def test_every_token_against_the_oracle(name: str) -> None:
    options = OPTIONS.get(name, {}) | ({"archer_kl_coef": 0.0} if name == "archer" else {})
    inputs = batch((0.0, 0.3), log_ratios=MODERATE if name == "steer" else LOG_RATIOS)
    inputs = marked(inputs, name, **options_of(MARKS[name], options))
    losses, gradients = token_losses(partial(POLICY_LOSSES[name], **options), inputs)
    values, slopes = zip(*expected_pairs(name, inputs), strict=True)
    torch.testing.assert_close(losses, in_response(values, inputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, in_response(slopes, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coef", [0.3, 2.0])
def test_kl_cov_has_no_penalty_gradient_at_ratio_one(coef: float) -> None:
    inputs = marked(batch(log_ratios=[0.0] * 13), "kl_cov", kl_cov_share=0.5)
    output = kl_cov(inputs, kl_cov_coef=coef)
    assert torch.equal(gradient(output, inputs), -inputs.advantages * inputs.response_mask)
    moved = marked(batch(log_ratios=[1e-3] * 13), "kl_cov", kl_cov_share=0.5)
    assert moved.marks is not None
    pull = (
        gradient(kl_cov(moved, kl_cov_coef=coef), moved)
        + moved.advantages * math.exp(1e-3) * moved.response_mask
    )
    torch.testing.assert_close(pull, coef * moved.marks.double() * moved.response_mask, rtol=1e-9, atol=1e-12)


def test_the_shares_that_are_reported() -> None:
    inputs = batch()
    number = int(inputs.response_mask.sum())
    marks = clip_cov_marks(update_tokens(inputs), **COV)
    means = clip_cov(marked(inputs, "clip_cov", **COV), **COV).metrics.means()
    assert means["cov_candidates"] == pytest.approx((marks > 0).sum().item() / number)
    assert means["cov_chosen"] == pytest.approx((marks == CHOSEN).sum().item() / number)
    assert kl_cov(marked(inputs, "kl_cov", kl_cov_share=0.1)).metrics.means()["cov_chosen"] == pytest.approx(
        10 / number
    )
    assert high_entropy(marked(inputs, "high_entropy")).metrics.means()["high_entropy_kept"] == pytest.approx(
        22 / number
    )
    means = archer(marked(inputs, "archer"), stat_scope="batch").metrics.means()
    assert means["reasoning_share"] == pytest.approx(
        sum(math.ceil((n - 1) / 5 - 1e-9) for n in (25, 32, 50)) / number
    )
    weighted = marked(inputs, "steer")
    assert weighted.marks is not None
    assert steer(weighted).metrics.means()["steer_weight"] == pytest.approx(
        weighted.marks[inputs.response_mask].double().mean().item()
    )


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_archers_kl_is_averaged_over_its_own_tokens(aggregation: str) -> None:
    inputs = marked(batch(aggregation=aggregation), "archer")
    assert inputs.marks is not None and inputs.sequence_ids is not None
    knowledge = (inputs.response_mask & (inputs.marks == 0)).tolist()
    kls, slopes = zip(*(oracle.kl(t, "k3") for t in tokens_of(inputs)), strict=True)
    ids = inputs.sequence_ids.tolist()
    kl_sum, kl_count, shares = reference.aggregate(kls, knowledge, ids, aggregation)
    with_kl = archer(inputs, archer_kl_coef=0.5, stat_scope="batch")
    without = archer(inputs, archer_kl_coef=0.0, stat_scope="batch")
    count = with_kl.count.item()
    assert (count, kl_count) == ((107, 85) if aggregation == "token_mean" else (3, 3))
    got = (with_kl.loss_sum - without.loss_sum).item() / count
    assert got == pytest.approx(0.5 * kl_sum / kl_count, rel=1e-6)  # beside a loss of 1e7
    expected = torch.tensor([0.5 * s * w / kl_count for s, w in zip(slopes, shares, strict=True)], dtype=F64)
    difference = (gradient(with_kl, inputs) - gradient(without, inputs)) / count
    torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-7)


def test_archers_kl_is_not_weighed_by_importance() -> None:
    inputs = marked(batch(), "archer")
    zero = dataclasses.replace(inputs, weights=torch.zeros_like(inputs.logprobs))
    assert archer(zero, archer_kl_coef=0.0, stat_scope="batch").loss_sum.item() == 0
    assert archer(zero, archer_kl_coef=0.5, stat_scope="batch").loss_sum.item() > 0


def test_archer_needs_a_reference_only_for_its_kl() -> None:
    inputs = dataclasses.replace(batch(), reference_logprobs=None)
    assert archer(inputs, archer_kl_coef=0.0).metrics.means()["knowledge_kl"] == 0
    with pytest.raises(
        ValueError, match=r"archer with archer_kl_coef > 0 needs LossInputs\.reference_logprobs"
    ):
        archer(inputs)


# ---- scope ----


@pytest.mark.parametrize("name", MARKS)
def test_over_a_whole_update_the_split_does_not_matter(name: str) -> None:
    options = OPTIONS.get(name, {}) | {"stat_scope": "batch"}
    inputs = marked(batch(log_ratios=MODERATE), name, **options_of(MARKS[name], options))
    whole = POLICY_LOSSES[name](inputs, **options)
    for members in ([[0], [1, 2], [3, -1]], [[3, -1], [2, 0], [1]], [[1, 3], [0, 2, -1]]):
        outputs = [POLICY_LOSSES[name](part, **options) for part in parts_of(inputs, members)]
        loss_sum = torch.stack([output.loss_sum for output in outputs]).sum()
        torch.testing.assert_close(loss_sum, whole.loss_sum, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad(loss_sum, inputs.logprobs)[0]
        torch.testing.assert_close(got, gradient(whole, inputs), rtol=1e-12, atol=1e-12)
        assert sum(output.count.item() for output in outputs) == whole.count.item()
        sums = sum(output.metrics.flat() for output in outputs)
        torch.testing.assert_close(sums, whole.metrics.flat(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MARKS)
def test_a_micro_batch_chooses_among_its_own_tokens(name: str) -> None:
    loss = partial(POLICY_LOSSES[name], **(OPTIONS.get(name, {}) | {"stat_scope": "micro"}))
    inputs = batch(log_ratios=MODERATE)
    assert inputs.entropy is not None and inputs.sequence_ids is not None
    ids = inputs.sequence_ids  # the sequences differ, so the choice over all of them is another one
    inputs = dataclasses.replace(
        inputs, entropy=inputs.entropy + ids, advantages=inputs.advantages * (1 + ids)
    )
    outputs = [loss(part) for part in parts_of(inputs, [[0], [1, 2], [3, -1]])]
    apart = torch.autograd.grad(torch.stack([output.loss_sum for output in outputs]).sum(), inputs.logprobs)[
        0
    ]
    together = gradient(loss(inputs), inputs)
    same = torch.allclose(apart, together, rtol=1e-12, atol=1e-12)
    assert same == (name == "archer")  # whose statistic is that of one response


@pytest.mark.parametrize("name", MARKS)
def test_a_micro_batch_that_is_the_update_chooses_the_same(name: str) -> None:
    options = OPTIONS.get(name, {})
    inputs = batch(log_ratios=MODERATE)
    order = torch.argsort(torch.tensor([2, 0, 3, 1, 4])[inputs.sequence_ids], stable=True)
    for kind in ("as packed", "in another order"):
        whole = marked(inputs, name, **options_of(MARKS[name], options))
        micro = inputs
        if kind == "in another order":  # packing sorts by length; the choice is by number
            whole, micro = tokens_only(whole, order), tokens_only(inputs, order)
        expected = POLICY_LOSSES[name](whole, **options | {"stat_scope": "batch"})
        got = POLICY_LOSSES[name](micro, **options | {"stat_scope": "micro"})
        torch.testing.assert_close(gradient(got, inputs), gradient(expected, inputs), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.metrics.flat(), expected.metrics.flat(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MARKS)
def test_what_a_scope_needs(name: str) -> None:
    loss, inputs = POLICY_LOSSES[name], batch()
    assert defaults_of(loss)["stat_scope"] == ("micro" if name == "archer" else "batch")
    with pytest.raises(
        ValueError, match=rf"{name} with stat_scope=batch needs LossInputs\.marks.*stat_scope=micro"
    ):
        loss(inputs, stat_scope="batch")
    with pytest.raises(ValueError, match=rf"{name} with stat_scope=micro needs LossInputs\.sequence_ids"):
        loss(dataclasses.replace(inputs, sequence_ids=None), stat_scope="micro")
    split: Any = object()
    with pytest.raises(ConfigError, match=r"stat_scope=micro needs whole responses.*Use .*stat_scope=batch"):
        loss(dataclasses.replace(inputs, context_group=split), stat_scope="micro")


@pytest.mark.parametrize("name", MARKS)
def test_a_loss_and_its_marks_have_the_same_defaults(name: str) -> None:
    loss = defaults_of(POLICY_LOSSES[name])
    assert {option: loss[option] for option in defaults_of(MARKS[name])} == defaults_of(MARKS[name])
