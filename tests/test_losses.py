"""What every policy loss and addition must do, whatever its formula; and the supervised loss."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_batch import (
    F64,
    LOG_RATIOS,
    METRICS,
    OPTIONS,
    batch,
    changed,
    gradient,
    leaf,
    marked,
    parts_of,
    tokens_only,
)
from torch import Tensor

from megatron_fec.algorithm.losses import (
    ADDITIONS,
    AGGREGATIONS,
    MARKS,
    POLICY_LOSSES,
    READS_BOUNDS,
    negative_log_likelihood,
)
from megatron_fec.algorithm.options import options_of
from megatron_fec.algorithm.strategies import build_policy_loss
from megatron_fec.types import LossInputs, LossOutput

MODERATE = [x if abs(x) < 20 else x / 100 for x in LOG_RATIOS]
# With r = 1 everywhere each of these is the plain policy gradient: first order agrees, whatever happens further out.
SAME_ON_POLICY: list[tuple[str, dict[str, Any]]] = [
    ("clip", {}),
    ("clip", {"dual_clip": 3.0}),
    ("reinforce", {}),
    ("gspo", {}),
    ("sapo", {}),
    ("sapo", {"tau_positive": 0.5, "tau_negative": 3.0}),
    ("cispo", {}),
    ("ce_gppo", {}),
    ("dcpo", {}),
    *(
        ("region", {"region": name, "mode": mode})
        for name in ("E1", "E2", "E3", "E4")
        for mode in ("only", "extend")
    ),
    ("kl_cov", {"kl_cov_share": 0.5, "kl_cov_coef": 3.0}),
    ("archer", {"archer_kl_coef": 0.0, "stat_scope": "batch"}),
    ("clip+truncated_importance", {}),
    ("clip+masked_importance", {"importance_level": "sequence"}),
]
ADDED = [f"reinforce+{name}" for name in ADDITIONS]


def built(name: str, options: dict[str, Any] | None = None) -> Callable[[LossInputs], LossOutput]:
    """The loss with the options under which the batch has tokens of every kind."""
    return build_policy_loss(name, OPTIONS.get(name, {}) if options is None else options)


def prepared(name: str, inputs: LossInputs, options: dict[str, Any] | None = None) -> LossInputs:
    """With the marks of the loss where it has some."""
    options = OPTIONS.get(name, {}) if options is None else options
    return marked(inputs, name, **(options_of(MARKS[name], options) if name in MARKS else {}))


def gradients(output: LossOutput, inputs: LossInputs) -> list[Tensor]:
    """With respect to logprobs and entropy; 0 where a loss does not see it."""
    assert inputs.entropy is not None
    return list(
        torch.autograd.grad(
            output.loss_sum, [inputs.logprobs, inputs.entropy], materialize_grads=True, retain_graph=True
        )
    )


def test_the_tables_agree() -> None:
    assert set(MARKS) <= set(POLICY_LOSSES) and set(POLICY_LOSSES) >= READS_BOUNDS
    assert not set(POLICY_LOSSES) & set(ADDITIONS)  # they share the namespace of algorithm.policy_loss
    assert all(name.isidentifier() for name in {**POLICY_LOSSES, **ADDITIONS})


@pytest.mark.parametrize("name", [*POLICY_LOSSES, *ADDITIONS])
def test_the_options_are_keywords_and_the_docstring_names_the_aggregation_of_the_source(name: str) -> None:
    function = {**POLICY_LOSSES, **ADDITIONS}[name]
    first, *options = inspect.signature(function).parameters.values()
    assert first.name == "inputs"
    assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options)
    assert name in ADDITIONS or "ource: " in str(function.__doc__)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_only_some_losses_read_the_bounds(name: str) -> None:
    narrow, wide = (prepared(name, batch(weights)) for weights in ((0.0, 0.0), (1.0, 1.0)))
    same = torch.equal(gradient(built(name)(narrow), narrow), gradient(built(name)(wide), wide))
    assert same == (name not in READS_BOUNDS)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("name", "options"), SAME_ON_POLICY)
def test_at_ratio_one_the_strategies_have_one_gradient(
    name: str, options: dict[str, Any], aggregation: str
) -> None:
    inputs = batch((0.7, 0.4), log_ratios=[0.0] * 12, aggregation=aggregation)
    inputs = dataclasses.replace(inputs, rollout_logprobs=inputs.old_logprobs)
    plain = POLICY_LOSSES["reinforce"](inputs)
    marks = prepared(name, inputs, options)
    got = gradient(build_policy_loss(name, options)(marks), marks)
    torch.testing.assert_close(got, gradient(plain, inputs), rtol=1e-14, atol=1e-15)
    if aggregation == "token_mean":
        assert torch.equal(gradient(plain, inputs), -inputs.advantages * inputs.response_mask)


@pytest.mark.parametrize("name", ["clip_cov", "high_entropy", "steer"])
def test_those_that_choose_scale_the_gradient_at_ratio_one(name: str) -> None:
    inputs = prepared(name, batch(log_ratios=[0.0] * 12))
    assert inputs.marks is not None
    scale = {"clip_cov": inputs.marks != 2, "high_entropy": inputs.marks > 0, "steer": inputs.marks}[
        name
    ].double()
    expected = -inputs.advantages * inputs.response_mask * scale
    assert not torch.equal(expected, -inputs.advantages * inputs.response_mask)
    torch.testing.assert_close(gradient(built(name)(inputs), inputs), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [name for name in POLICY_LOSSES if name != "clip"])
def test_off_policy_they_are_different_losses(name: str) -> None:
    inputs, clip = prepared(name, batch(log_ratios=MODERATE)), batch(log_ratios=MODERATE)
    assert not torch.allclose(gradient(built(name)(inputs), inputs), gradient(built("clip")(clip), clip))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", [*POLICY_LOSSES, *ADDED])
def test_the_split_into_micro_batches_does_not_matter(name: str, aggregation: str) -> None:
    inputs = prepared(name, batch((0.7, 0.4), aggregation=aggregation))
    whole = built(name)(inputs)
    outputs = [built(name)(part) for part in parts_of(inputs, [[0], [1, 2], [3, -1]])]
    loss_sum = torch.stack([output.loss_sum for output in outputs]).sum()
    torch.testing.assert_close(loss_sum, whole.loss_sum, rtol=1e-12, atol=1e-12)
    assert sum(output.count.item() for output in outputs) == whole.count.item()
    sums = dataclasses.replace(whole, loss_sum=loss_sum)
    for got, expected in zip(gradients(sums, inputs), gradients(whole, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    metrics = outputs[0].metrics + outputs[1].metrics + outputs[2].metrics
    torch.testing.assert_close(metrics.flat(), whole.metrics.flat(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *((name, {}) for name in (*POLICY_LOSSES, *ADDED) if name not in MARKS),
        *((name, {"stat_scope": scope}) for name in MARKS for scope in ("batch", "micro")),
    ],
)
def test_nothing_outside_the_response_reaches_the_loss(name: str, scope: dict[str, str]) -> None:
    loss = built(name, OPTIONS.get(name, {}) | scope)
    inputs = prepared(name, batch((0.7, 0.4), aggregation="seq_mean_token_mean"))
    inputs = dataclasses.replace(inputs, weights=torch.full_like(inputs.logprobs, 1.5))
    clean = loss(inputs)
    for bad in (math.nan, math.inf, -math.inf):

        def spoiled(_: str, values: Tensor, bad: float = bad) -> Tensor:
            if not values.is_floating_point():
                return values
            return torch.where(inputs.response_mask, values.detach(), bad)

        dirty = leaf(changed(inputs, spoiled))
        output = loss(dirty)
        assert torch.equal(output.loss_sum, clean.loss_sum)
        for got, expected in zip(gradients(output, dirty), gradients(clean, inputs), strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(output.metrics.flat(), clean.metrics.flat())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("size", [0, 6])
@pytest.mark.parametrize("name", [*POLICY_LOSSES, *ADDED])
def test_without_response_tokens_the_loss_is_a_connected_zero(name: str, size: int, aggregation: str) -> None:
    whole = prepared(name, batch(aggregation=aggregation))
    part = leaf(tokens_only(whole, torch.arange(size)))
    nothing = torch.zeros(size, dtype=torch.bool)
    part = dataclasses.replace(
        part, response_mask=nothing, logprobs=torch.full((size,), -math.inf, dtype=F64, requires_grad=True)
    )
    scopes = ["batch", "micro"] if name in MARKS else [None]
    for scope in scopes:
        options = OPTIONS.get(name, {}) | ({"stat_scope": scope} if scope else {})
        output = built(name, options)(part)
        assert output.loss_sum.item() == 0 and output.count.item() == 0
        assert torch.equal(gradient(output, part), torch.zeros(size, dtype=F64))
        assert output.metrics.names == built(name)(whole).metrics.names  # or the sums could not be added
        assert not any(output.metrics.means().values())


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_nan_in_the_response_is_not_hidden(name: str) -> None:
    inputs = prepared(name, batch())
    assert inputs.entropy is not None
    first = int((inputs.response_mask & (inputs.advantages > 0) & (inputs.entropy > 1.9)).nonzero()[0])
    if name == "clip_cov":  # unless the token was taken out
        assert inputs.marks is not None and inputs.marks[first] != 2
    logprobs = inputs.logprobs.detach().clone()
    logprobs[first] = math.nan
    assert built(name)(dataclasses.replace(inputs, logprobs=logprobs)).loss_sum.isnan()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_loss_reports_the_common_metrics_and_its_own(name: str) -> None:
    inputs = prepared(name, batch())
    metrics = built(name)(inputs).metrics
    own = {
        "cispo": ("ratio_capped",),
        "region": ("region_share",),
        "clip_cov": ("cov_candidates", "cov_chosen"),
        "kl_cov": ("cov_chosen",),
        "high_entropy": ("high_entropy_kept",),
        "archer": ("reasoning_share", "knowledge_kl"),
        "steer": ("steer_weight",),
    }
    assert metrics.names == (*METRICS, *own.get(name, ()))
    clips = [metrics.means()[f"clip_fraction_{side}"] for side in ("upper", "lower")]
    assert (min(clips) > 0) == (max(clips) > 0) == (name not in ("reinforce", "sapo", "cispo", "kl_cov"))
    assert not metrics.flat().requires_grad


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_weight_scales_its_token(name: str) -> None:
    options = OPTIONS.get(name, {}) | ({"archer_kl_coef": 0.0} if name == "archer" else {})
    inputs = prepared(name, batch(), options)
    weights = torch.linspace(0.1, 3.0, len(inputs.logprobs), dtype=F64)
    got = gradient(built(name, options)(dataclasses.replace(inputs, weights=weights)), inputs)
    expected = weights * gradient(built(name, options)(inputs), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [*POLICY_LOSSES, *ADDED])
def test_float32_is_float64_to_its_rounding(name: str) -> None:
    single = prepared(name, batch((0.7, 0.4), dtype=torch.float32, log_ratios=MODERATE))
    double = leaf(changed(single, lambda _, v: v.double() if v.is_floating_point() else v))
    got, expected = built(name)(single), built(name)(double)
    assert got.loss_sum.dtype == torch.float32
    assert got.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=2e-6)
    for a, b in zip(gradients(got, single), gradients(expected, double), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=max(1e-6 * b.abs().max().item(), 1e-12))


# ---- supervised ----


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
