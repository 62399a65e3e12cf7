"""The predicted entropy change against finite steps over the logits in float64, its splits, and the signs by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fec.algorithm.aggregation import AGGREGATIONS
from megatron_fec.algorithm.entropy_change import (
    derived,
    entropy_change_metrics,
    token_gradients,
    unclipped_gradients,
)
from megatron_fec.algorithm.losses import POLICY_LOSSES
from megatron_fec.algorithm.strategies import build_policy_loss
from megatron_fec.metrics import MetricSums
from megatron_fec.types import ClipBounds, LossInputs, LossOutput

F64 = torch.float64
TOKENS, VOCABULARY = 241, 37
LOSSES = {
    "clip": build_policy_loss("clip", {"dual_clip": 3.0}),
    "reinforce": build_policy_loss("reinforce", {}),
    "truncated": build_policy_loss("clip+truncated_importance", {}),
}


def entropy_of(logits: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def alignment_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """<grad ln p, grad H> by autograd, row by row."""
    leaf = logits.detach().requires_grad_()
    logprobs = leaf.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    (up,) = torch.autograd.grad(logprobs.sum(), leaf)
    (widen,) = torch.autograd.grad(entropy_of(leaf).sum(), leaf)
    return (up * widen).sum(-1)


def batch(*, scale: float = 4.0, aggregation: str = "token_mean") -> tuple[Tensor, Tensor, LossInputs]:
    """(logits, tokens, inputs): peaked and flat rows, A of both signs and 0, ratios on both sides of all bounds."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    logits = scale * torch.rand(TOKENS, 1, dtype=F64, generator=generator) * randn(TOKENS, VOCABULARY)
    tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    tokens[::3] = logits.argmax(-1)[::3]
    logprobs = logits.log_softmax(-1)[torch.arange(TOKENS), tokens]
    old = (logprobs - 0.3 * randn(TOKENS)).clamp(max=0)
    old[:3] = logprobs[:3] - 1.5  # a ratio above the dual clip
    ids = torch.arange(5).repeat_interleave(torch.tensor([27, 80, 13, 120, 1]))
    mask = torch.arange(TOKENS) % 7 != 4
    advantages = randn(5)[ids]
    advantages[:27], advantages[-1] = -0.8, 0.0
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=torch.where(mask, advantages, 0.0),
        response_mask=mask,
        bounds=ClipBounds(
            eps_lower=torch.full_like(logprobs, 0.2), eps_upper=torch.full_like(logprobs, 0.28)
        ),
        entropy=entropy_of(logits),
        alignment=alignment_of(logits, tokens),
        rollout_logprobs=logprobs - 0.5 * randn(TOKENS),
        sequence_ids=ids,
        aggregation=aggregation,
    )
    return logits, tokens, inputs


def means(inputs: LossInputs, gradients: Tensor, old_entropy: Tensor | None = None) -> dict[str, float]:
    return MetricSums.of(entropy_change_metrics(gradients, inputs, old_entropy=old_entropy)).means()


def real_change(
    loss: Callable[[LossInputs], LossOutput], logits: Tensor, tokens: Tensor, inputs: LossInputs, eta: float
) -> float:
    """Mean entropy of the response tokens after a step of size eta over the logits, minus that before."""
    leaf = logits.detach().requires_grad_()
    logprobs = leaf.log_softmax(-1)[torch.arange(TOKENS), tokens]
    entropy = entropy_of(logits)
    (step,) = torch.autograd.grad(loss(replace(inputs, logprobs=logprobs)).loss_sum, leaf)
    return (entropy_of(logits - eta * step) - entropy)[inputs.response_mask].mean().item()


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_small_step_over_the_logits_changes_entropy_as_predicted(name: str, aggregation: str) -> None:
    logits, tokens, inputs = batch(aggregation=aggregation)
    predicted = means(inputs, token_gradients(LOSSES[name], inputs))["dH/predicted"]
    assert abs(predicted) > 1e-4
    misses = [
        real_change(LOSSES[name], logits, tokens, inputs, eta) - eta * predicted for eta in (1e-4, 5e-5)
    ]
    assert abs(misses[0]) < 0.02 * abs(1e-4 * predicted)
    assert misses[0] / misses[1] == pytest.approx(4, rel=0.05)  # the error is of second order


def test_the_paper_s_equation_6_would_not_predict_that_step() -> None:
    logits, tokens, inputs = batch()
    gradients = token_gradients(LOSSES["clip"], inputs)
    p, lp = inputs.logprobs.exp(), inputs.logprobs
    assert inputs.entropy is not None
    without_b = replace(inputs, alignment=-p * (lp + inputs.entropy))
    change = real_change(LOSSES["clip"], logits, tokens, inputs, 1e-5) / 1e-5
    assert means(inputs, gradients)["dH/predicted"] == pytest.approx(change, rel=1e-3)
    assert means(without_b, gradients)["dH/predicted"] != pytest.approx(change, rel=0.05)


def test_the_gradient_of_clip_is_minus_a_r_and_0_where_cut() -> None:
    _, _, inputs = batch()
    gradients = token_gradients(LOSSES["clip"], inputs)
    columns = (inputs.logprobs, inputs.old_logprobs, inputs.advantages)
    expected, cut = [], 0
    for lp, old, a in zip(*(column.tolist() for column in columns), strict=True):
        r = math.exp(lp - old)
        is_cut = (a > 0 and r > 1.28) or (a < 0 and (r < 0.8 or r > 3))
        cut += is_cut
        expected.append(0.0 if is_cut else -a * r)
    assert cut > 5
    torch.testing.assert_close(gradients, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    torch.testing.assert_close(unclipped_gradients(inputs), -inputs.advantages * ratio, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_without_clipping_is_what_infinite_bounds_give(aggregation: str) -> None:
    _, _, inputs = batch(aggregation=aggregation)
    inputs = replace(inputs, max_response_tokens=40, weights=torch.linspace(0.5, 2, TOKENS, dtype=F64))
    wide = ClipBounds(
        eps_lower=torch.ones(TOKENS, dtype=F64), eps_upper=torch.full((TOKENS,), 1e9, dtype=F64)
    )
    loss = build_policy_loss("clip", {"dual_clip": None})
    expected = token_gradients(loss, replace(inputs, bounds=wide))
    torch.testing.assert_close(unclipped_gradients(inputs), expected, rtol=1e-12, atol=1e-12)


def test_beyond_the_log_ratio_clamp_there_is_no_gradient_to_cut() -> None:
    _, _, inputs = batch()
    inputs = replace(inputs, log_ratio_clamp=0.1)
    far = (inputs.logprobs - inputs.old_logprobs).abs() > 0.1
    assert torch.equal(unclipped_gradients(inputs) == 0, far | (inputs.advantages == 0))


def test_a_loss_leaves_the_graph_of_the_caller_alone() -> None:
    _, _, inputs = batch()
    leaf = inputs.logprobs.clone().requires_grad_()
    assert inputs.entropy is not None
    entropy = inputs.entropy.clone().requires_grad_()
    loss = build_policy_loss("clip+entropy_bonus", {"entropy_coef": 0.1})
    with torch.no_grad():
        gradients = token_gradients(loss, replace(inputs, logprobs=leaf * 1, entropy=entropy))
    assert leaf.grad is None and entropy.grad is None and not gradients.requires_grad
    torch.testing.assert_close(gradients, token_gradients(build_policy_loss("clip", {}), inputs))


def test_outside_the_response_nothing_counts() -> None:
    _, _, inputs = batch()
    outside = ~inputs.response_mask
    clean = means(inputs, token_gradients(LOSSES["clip"], inputs), inputs.entropy)

    def dirty(values: Tensor | None) -> Tensor:
        assert values is not None
        return torch.where(outside, math.nan, values)

    spoiled = replace(
        inputs,
        logprobs=dirty(inputs.logprobs),
        old_logprobs=dirty(inputs.old_logprobs),
        entropy=dirty(inputs.entropy),
        alignment=dirty(inputs.alignment),
        advantages=dirty(inputs.advantages),
    )
    gradients = token_gradients(LOSSES["clip"], spoiled)
    assert gradients.isfinite().all()
    assert means(spoiled, gradients, dirty(inputs.entropy)) == clean


def by_hand(inputs: LossInputs, gradients: Tensor) -> dict[str, float]:
    """The splits, token by token, from the definitions of section 3 and the surprisal."""
    assert inputs.alignment is not None and inputs.entropy is not None
    columns = (inputs.logprobs, inputs.old_logprobs, inputs.advantages, inputs.entropy, inputs.alignment)
    sums: dict[str, float] = {}
    rows = zip(*(c.tolist() for c in (*columns, gradients, inputs.response_mask)), strict=True)
    for lp, old, a, h, alignment, g, counts in rows:
        if not counts:
            continue
        p, r, dh, raw = math.exp(lp), math.exp(lp - old), -g * alignment, a * math.exp(lp - old) * alignment
        names = ["predicted"]
        region = "none"
        if a > 0 and 1 < r < 1.3 and not 0.3 < p <= 0.7:
            region = "E1" if p > 0.7 else "E2"
        if a < 0 and 0.7 < r < 1 and not 0.3 < p <= 0.7:
            region = "E3" if p > 0.7 else "E4"
        names.append(f"region_{region}")
        if a != 0:
            names.append("surprisal_E" + str((1 if a > 0 else 3) + (0 if -lp < h else 1)))
            fifth = min(int(p * 5), 4) / 5
            names.append(f"{'positive' if a > 0 else 'negative'}_p{fifth:.1f}")
        for name in names:
            sums[name] = sums.get(name, 0.0) + dh
        sums["unclipped"] = sums.get("unclipped", 0.0) + raw
        if g == 0 and a != 0:
            sums["unclipped_of_cut"] = sums.get("unclipped_of_cut", 0.0) + raw
        side = "polarity_up" if a * alignment > 0 else "polarity_down"
        sums[side] = sums.get(side, 0.0) + a * alignment
    return {f"dH/{name}": value / int(inputs.response_mask.sum()) for name, value in sums.items()}


def test_splits_against_the_definitions() -> None:
    _, _, inputs = batch(scale=8.0)
    gradients = token_gradients(LOSSES["clip"], inputs)
    got, expected = means(inputs, gradients), by_hand(inputs, gradients)
    assert all(f"dH/region_E{i}" in expected for i in (1, 2, 3, 4)) and len(expected) > 18
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-15), name
    assert {name for name, value in got.items() if value and name not in expected} == {
        "dH/advantage", "dH/logprob", "dH/product", "dH/wrong_sign",
    }  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_every_split_adds_up(name: str) -> None:
    _, _, inputs = batch()
    gradients = token_gradients(LOSSES[name], inputs)
    got = means(inputs, gradients)
    assert inputs.alignment is not None
    change = torch.where(inputs.response_mask, -gradients * inputs.alignment, 0.0) / int(
        inputs.response_mask.sum()
    )
    up = change[inputs.advantages > 0].sum().item()
    down = change[inputs.advantages < 0].sum().item()

    def total(*starts: str) -> float:
        return math.fsum(value for name, value in got.items() if name.startswith(starts))

    assert total("dH/region_") == pytest.approx(got["dH/predicted"], rel=1e-9)
    assert total("dH/surprisal_E1", "dH/surprisal_E2") == pytest.approx(up, rel=1e-9)
    assert total("dH/surprisal_E3", "dH/surprisal_E4") == pytest.approx(down, rel=1e-9)
    assert total("dH/positive_p") == pytest.approx(up, rel=1e-9)
    assert total("dH/negative_p") == pytest.approx(down, rel=1e-9)
    assert got["dH/predicted"] == pytest.approx(up + down, rel=1e-9)


def test_what_clipping_takes_away() -> None:
    _, _, inputs = batch()
    got = means(inputs, token_gradients(LOSSES["clip"], inputs))
    assert got["dH/unclipped_of_cut"] != 0
    assert got["dH/unclipped"] - got["dH/unclipped_of_cut"] == pytest.approx(got["dH/predicted"], rel=1e-9)


def of_distribution(probs: list[float], token: int) -> tuple[float, float, float]:
    """(ln p, H, alignment) of one token."""
    entropy = -math.fsum(p * math.log(p) for p in probs)
    b = math.fsum(p * p * (math.log(p) + entropy) for p in probs)
    logprob = math.log(probs[token])
    return logprob, entropy, b - probs[token] * (logprob + entropy)


@pytest.mark.parametrize(
    ("probs", "token", "is_wrong"),
    [
        ([0.9, 0.05, 0.05], 0, False),  # p (ln p + H) > B: both signs say that entropy falls
        ([0.9, 0.05, 0.05], 1, False),  # below 0: both say that it rises
        ([0.5, 0.3, 0.2], 0, False),
        ([0.6, 0.38, 0.02], 1, False),  # less likely than average: never wrong
        ([0.5, 0.45, 0.05], 1, True),  # 0 < p (ln p + H) < B: likely, yet reinforcing it raises entropy
        ([0.52, 0.42, 0.06], 1, True),
        ([0.25, 0.25, 0.25, 0.25], 2, False),  # both 0 but for rounding
        ([1 - 3e-8, 1e-8, 1e-8, 1e-8], 0, False),
    ],
)
def test_where_the_sign_of_equation_6_is_wrong(probs: list[float], token: int, is_wrong: bool) -> None:
    logprob, entropy, alignment = of_distribution(probs, token)
    first = probs[token] * (logprob + entropy)
    if is_wrong:
        assert first > 1e-3 and alignment > 1e-3
    for dtype in (torch.float32, F64):
        assert wrong_sign(logprob, entropy, alignment, dtype) == is_wrong


def test_rounding_alone_makes_no_sign_wrong() -> None:
    assert wrong_sign(-1e-7, 2e-6, 1e-3, torch.float32) == 0  # the error of fp32 statistics is of this size
    assert wrong_sign(-0.1, 0.2, 1e-6, torch.float32) == 0
    assert wrong_sign(-0.1, 0.2, 1e-3, torch.float32) == 1


def wrong_sign(logprob: float, entropy: float, alignment: float, dtype: torch.dtype) -> float:
    """The metric of one such token, beside one that does not count."""
    lp = torch.tensor([logprob, math.nan], dtype=dtype)
    inputs = LossInputs(
        logprobs=lp,
        old_logprobs=lp,
        advantages=torch.ones(2),
        response_mask=torch.tensor([True, False]),
        bounds=ClipBounds(eps_lower=torch.ones(2), eps_upper=torch.ones(2)),
        entropy=torch.tensor([entropy, 1.0], dtype=dtype),
        alignment=torch.tensor([alignment, 1.0], dtype=dtype),
    )
    return means(inputs, torch.zeros(2))["dH/wrong_sign"]


def test_the_covariance_comes_from_reduced_means() -> None:
    _, _, inputs = batch()
    got = means(inputs, torch.zeros(TOKENS, dtype=F64))
    kept = torch.stack([inputs.advantages, inputs.logprobs])[:, inputs.response_mask]
    expected = torch.cov(kept, correction=0)[0, 1].item()
    assert derived(got)["dH/covariance"] == pytest.approx(expected, rel=1e-9)


def test_the_measured_change_stands_beside_the_predicted_one() -> None:
    _, _, inputs = batch()
    assert inputs.entropy is not None
    old = inputs.entropy + torch.linspace(-0.1, 0.5, TOKENS, dtype=F64)
    expected = -torch.linspace(-0.1, 0.5, TOKENS, dtype=F64)[inputs.response_mask].mean().item()
    gradients = torch.zeros(TOKENS, dtype=F64)
    assert means(inputs, gradients, old)["dH/measured"] == pytest.approx(expected, rel=1e-9)
    assert "dH/measured" not in means(inputs, gradients)


def test_the_same_names_in_every_micro_batch() -> None:
    _, _, inputs = batch()
    empty = replace(inputs, response_mask=torch.zeros(TOKENS, dtype=torch.bool))
    gradients = token_gradients(LOSSES["clip"], empty)
    assert not gradients.any()
    names = list(entropy_change_metrics(gradients, empty, old_entropy=inputs.entropy))
    assert names == list(entropy_change_metrics(torch.ones(TOKENS), inputs, old_entropy=inputs.entropy))
    assert len(names) == 29
    assert set(means(empty, gradients).values()) == {0.0}


def test_two_micro_batches_add_up_to_the_whole() -> None:
    _, _, inputs = batch()
    half = torch.arange(TOKENS) < 107  # a border between sequences
    whole = means(inputs, token_gradients(LOSSES["clip"], inputs), inputs.entropy)
    total: MetricSums | None = None
    for mask in (half, ~half):
        part = replace(inputs, response_mask=inputs.response_mask & mask)
        gradients = token_gradients(LOSSES["clip"], part)
        sums = MetricSums.of(entropy_change_metrics(gradients, part, old_entropy=inputs.entropy))
        total = sums if total is None else total + sums
    assert total is not None
    assert total.means() == pytest.approx(whole, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_policy_loss_has_the_gradients_that_training_sees(name: str) -> None:
    _, _, inputs = batch()
    inputs = replace(
        inputs, reference_logprobs=inputs.old_logprobs, update_lengths=torch.tensor([23, 69, 11, 102, 1])
    )
    loss = build_policy_loss(name, {"stat_scope": "micro", "region": "E1"})
    leaf = inputs.logprobs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(replace(inputs, logprobs=leaf)).loss_sum, leaf)
    assert expected.abs().sum() > 0
    assert torch.equal(token_gradients(loss, inputs), expected)
