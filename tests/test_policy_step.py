"""One update against a float64 oracle, its limits (ratio 1, nothing to train on, NaN), and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from policy_fixtures import (
    DUAL_CLIP,
    LONGEST,
    WEIGHTS,
    Outcome,
    TokenKey,
    advantages,
    assert_same_weights,
    clip_token_loss,
    copied_weights,
    fp32,
    hf_gradients,
    make_groups,
    nll_step,
    nll_token_loss,
    old_logprob_table,
    on_layout,
    one_update,
    pack_for,
    save_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_fec.algorithm.losses import AGGREGATIONS
from megatron_fec.config import OptimizerConfig
from megatron_fec.policy.optimizer import CONSTANT_STEPS
from megatron_fec.policy.step import Policy, compute_logprobs, reduce_metrics, train_update
from megatron_fec.types import LossOutput, MicroBatch, TokenStats


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in ("qwen2", "tied", "qwen3", "llama3")
    }


def first_update(policy: Policy, **options: Any) -> Sequence[MicroBatch]:
    return pack_for(policy, make_groups(), **options)[0]


# ---- the float64 oracle ----


def oracle(
    model_dir: Path, how: str
) -> tuple[dict[TokenKey, tuple[float, float, bool]], dict[str, float], dict]:
    """(tokens, metrics with the loss, gradients) by transformers in float64 and the scalar formulas of reference.py."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    model.model.embed_tokens.padding_idx = None  # transformers gives the row of <pad> no gradient
    table = old_logprob_table(model_dir)
    keys: list[TokenKey] = []
    chosen: list[Tensor] = []  # log-probs, with graph
    entropies: list[float] = []
    groups = make_groups()
    samples = [(group.prompt.token_ids, sample.token_ids) for group in groups for sample in group.samples]
    for number, (prompt, response) in enumerate(samples):
        logprobs = model(torch.tensor([[*prompt, *response]])).logits[0, :, :37].log_softmax(-1)
        for position, token in enumerate(response, start=len(prompt) - 1):
            keys.append((number, position))
            chosen.append(logprobs[position, token])
            entropies.append(-(logprobs[position].exp() * logprobs[position]).sum().item())
    values = [logprob.item() for logprob in chosen]
    olds = [table[key].item() for key in keys]
    advantage = [advantages().flatten()[number].item() for number, _ in keys]
    bounds = [reference.bounds(math.exp(value), WEIGHTS.upper, WEIGHTS.lower) for value in values]
    tokens = [
        reference.clip_loss(value, old, a, low, up, DUAL_CLIP)
        for value, old, a, (low, up) in zip(values, olds, advantage, bounds, strict=True)
    ]
    loss_sum, count, slopes = reference.aggregate(
        [loss for loss, _ in tokens],
        [True] * len(keys),
        [number for number, _ in keys],
        how,
        longest=LONGEST,
    )
    weights = torch.tensor([slope * token[1] / count for slope, token in zip(slopes, tokens, strict=True)])
    (torch.stack(chosen) * weights.double()).sum().backward()
    lows, ups = zip(*bounds, strict=True)
    metrics = reference.metrics(values, olds, advantage, lows, ups, entropies, DUAL_CLIP)
    table_of_tokens = {
        key: (value, entropy, token[1] == 0.0)
        for key, value, entropy, token in zip(keys, values, entropies, tokens, strict=True)
    }
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return table_of_tokens, metrics | {"loss": loss_sum / count}, gradients


@pytest.mark.parametrize("how", list(AGGREGATIONS))
@pytest.mark.parametrize("kind", ["qwen2", "tied", "qwen3", "llama3"])
def test_an_update_is_that_of_the_equations(models: dict[str, Path], kind: str, how: str) -> None:
    table = old_logprob_table(models[kind])
    loss = partial(clip_token_loss, aggregation=how)

    def job(policy: Policy) -> tuple[Outcome, dict[str, Tensor]]:
        batches = first_update(policy, micro_batch_tokens=32)
        assert len(batches) > 2
        return one_update(policy, batches, old_logprobs=table, token_loss=loss), hf_gradients(policy)

    (((outcome, gradients),)) = on_layout(models[kind], job)
    tokens, metrics, wanted = oracle(models[kind], how)
    assert outcome.tokens.keys() == tokens.keys()
    for key, (logprob, entropy, is_clipped) in tokens.items():
        assert outcome.tokens[key][:2] == pytest.approx((logprob, entropy), rel=1e-6, abs=4e-6)  # fp32 layers
        assert outcome.tokens[key][2] == is_clipped
    assert 10 < sum(token[2] for token in tokens.values()) < len(tokens) - 10
    assert {name: outcome.metrics[name] for name in metrics} == pytest.approx(metrics, rel=2e-6, abs=1e-6)
    assert metrics["dual_clip_fraction"] > 0
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in wanted.values()))
    assert outcome.grad_norm == pytest.approx(norm, rel=2e-6)
    assert gradients.keys() == wanted.keys()
    for (
        name,
        gradient,
    ) in wanted.items():  # each within rounding of its largest entry, through two fp32 layers
        torch.testing.assert_close(
            gradients[name].double(), gradient, rtol=0, atol=5e-6 * gradient.abs().max().item(), msg=name
        )


# ---- ratio 1 ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"pipeline_parallel": 2},
        {"options": {"recompute": "full"}},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_ratio_is_exactly_1(
    models: dict[str, Path], precision: str, settings: dict[str, Any]
) -> None:
    def job(policy: Policy) -> dict[str, float]:
        batches = first_update(policy, micro_batch_tokens=32)
        return one_update(policy, batches, old_logprobs=None).metrics

    for metrics in on_layout(models["qwen3"], job, fp32(precision=precision, **settings)):
        assert metrics["log_ratio_abs"] == 0.0
        assert metrics["approx_kl"] == 0.0 and metrics["ratio_moved"] == 0.0
        assert metrics["loss"] != 0.0


def test_the_second_ratio_is_not(models: dict[str, Path]) -> None:
    def job(policy: Policy) -> list[float]:
        (batches,), _ = compute_logprobs(policy, [first_update(policy)])
        policy.scheduler.step(1)
        found = []
        for _ in range(2):
            sums, _ = train_update(policy, batches, clip_token_loss)
            found.append(reduce_metrics(sums, policy.layout).means()["log_ratio_abs"])
        return found

    ((first, second),) = on_layout(models["qwen2"], job)
    assert first == 0.0 and second > 1e-3


# ---- nothing to train on ----


def without_response(micro_batch: MicroBatch) -> MicroBatch:
    return replace(micro_batch, response_mask=torch.zeros_like(micro_batch.response_mask))


def test_a_micro_batch_without_response_tokens_adds_nothing(models: dict[str, Path]) -> None:
    def job(policy: Policy) -> Any:
        (batch,) = first_update(policy)
        found = []
        for batches in ([batch], [batch, without_response(batch)]):
            (filled,), _ = compute_logprobs(policy, [batches])
            sums, grad_norm = train_update(policy, filled, clip_token_loss)
            gradients = {n: p.main_grad.clone() for n, p in policy.chunks[0].named_parameters()}  # type: ignore[attr-defined]
            found.append((reduce_metrics(sums, policy.layout).means(), grad_norm, gradients))
        return found

    (((metrics, norm, gradients), (metrics2, norm2, gradients2)),) = on_layout(
        models["qwen2"], job, optimizer=OptimizerConfig(lr=1e-30, weight_decay=0.0)
    )
    assert metrics2 == metrics and norm2 == norm
    assert_same_weights(gradients2, gradients)


def test_an_update_without_response_tokens_runs(models: dict[str, Path]) -> None:
    def job(policy: Policy) -> Any:
        before = copied_weights(policy)
        batches = [without_response(batch) for batch in first_update(policy)]
        (filled,), sums = compute_logprobs(policy, [batches])
        metric_sums, grad_norm = train_update(policy, filled, clip_token_loss)
        assert_same_weights(copied_weights(policy), before)
        return sums.means(), reduce_metrics(metric_sums, policy.layout).means()["loss"], grad_norm

    optimizer = OptimizerConfig(lr=0.1, weight_decay=0.0)
    for means, loss, grad_norm in on_layout(
        models["qwen2"], job, fp32(pipeline_parallel=2), optimizer=optimizer
    ):
        assert set(means.values()) == {0.0} and loss == 0.0 and grad_norm == 0.0


@pytest.mark.parametrize("is_distributed", [False, True])
def test_a_data_parallel_rank_without_sequences_takes_part(
    models: dict[str, Path], is_distributed: bool
) -> None:
    groups = [replace(make_groups(1)[0], samples=make_groups(1)[0].samples[:1])]  # one sequence

    def job(policy: Policy) -> Any:
        (batches,) = pack_for(policy, groups)
        has_some = any(bool(batch.response_mask.any()) for batch in batches)
        return has_some, one_update(policy, batches, old_logprobs=None, token_loss=nll_token_loss)

    settings = fp32(distributed_optimizer=is_distributed)
    ((_, wanted),) = on_layout(models["qwen2"], job, settings)
    pair = on_layout(models["qwen2"], job, settings, data_parallel=2)
    assert [has_some for has_some, _ in pair] == [True, False]
    for _, outcome in pair:
        assert outcome.metrics == wanted.metrics
        assert outcome.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)  # summed over shards
        assert_same_weights(outcome.weights, wanted.weights)


# ---- not a number ----


def with_nan(micro_batch: MicroBatch) -> MicroBatch:
    spoiled = micro_batch.advantages.clone()
    spoiled[micro_batch.response_mask.nonzero()[0]] = math.nan
    return replace(micro_batch, advantages=spoiled)


def gradient_of_nan(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
    """A finite loss whose derivative is 0 * inf."""
    out = nll_token_loss(stats, micro_batch)
    return replace(out, loss_sum=out.loss_sum + (stats.entropy.sum() * 0).sqrt())


def refusal(policy: Policy, spoil: Callable[[Sequence[MicroBatch]], Any], token_loss: Any) -> str:
    """The message of the error, after which the weights have not moved and a clean update works."""
    before = copied_weights(policy)
    batches = first_update(policy, micro_batch_tokens=32)
    (filled,), _ = compute_logprobs(policy, [batches])
    policy.scheduler.step(1)
    with pytest.raises(RuntimeError) as error:
        train_update(policy, spoil(filled), token_loss)
    assert_same_weights(copied_weights(policy), before)
    assert math.isfinite(one_update(policy, batches, old_logprobs=None).grad_norm)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "data_parallel", "culprit"),
    [
        ({}, 2, 1),
        ({"distributed_optimizer": True}, 2, 1),
        ({"tensor_parallel": 2}, 1, 0),
        ({"pipeline_parallel": 2}, 1, 1),
        ({"precision": "bf16", "distributed_optimizer": True}, 2, 1),
    ],
)
def test_a_loss_that_is_not_finite_stops_every_rank(
    models: dict[str, Path], settings: dict[str, Any], data_parallel: int, culprit: int
) -> None:
    def job(policy: Policy) -> str:
        def spoil(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
            is_culprit = policy.layout.data_parallel_rank == data_parallel - 1
            return [with_nan(batches[0]), *batches[1:]] if is_culprit else list(batches)

        return refusal(policy, spoil, clip_token_loss)

    for message in on_layout(models["qwen2"], job, fp32(**settings), data_parallel=data_parallel):
        assert message == f"not finite: the loss, first on rank {culprit}"


@pytest.mark.parametrize(
    ("settings", "culprit"), [({}, 0), ({"tensor_parallel": 2}, 0), ({"pipeline_parallel": 2}, 1)]
)
def test_a_gradient_that_is_not_finite_is_named(
    models: dict[str, Path], settings: dict[str, Any], culprit: int
) -> None:
    """Backward starts at the head, on the last stage."""

    def job(policy: Policy) -> str:
        return refusal(policy, list, gradient_of_nan)

    for message in on_layout(models["qwen2"], job, fp32(**settings)):
        head = "the gradient of module.output_layer.weight"
        assert message == f"not finite: {head}, first on rank {culprit}"


# ---- the learning rate ----


def learning_rates(model_dir: Path, settings: OptimizerConfig, total_steps: int) -> list[float]:
    """Of the steps 0, 1, ..., as the trainer takes them: the schedule moves before the update."""

    def job(policy: Policy) -> list[float]:
        found = []
        for _ in range(total_steps):
            policy.scheduler.step(increment=1)
            found += {group["lr"] for group in policy.optimizer.param_groups}
        return found

    (rates,) = on_layout(model_dir, job, optimizer=settings, total_steps=total_steps)
    return rates


@pytest.mark.parametrize(
    ("settings", "total_steps", "wanted"),
    [
        ({}, 3, [1.0, 1.0, 1.0]),
        ({"warmup_steps": 4}, 6, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"lr_schedule": "cosine"}, 1, [0.5]),
        # (1 + cos(pi k / 4)) / 2 for k = 1, 2, 3; it is 0 at step 3, which is not taken
        ({"lr_schedule": "cosine"}, 3, [(2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]),
        (
            {"lr_schedule": "cosine", "warmup_steps": 2},
            5,
            [0.5, 1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4],
        ),
        ({"lr_schedule": "cosine", "warmup_steps": 5}, 3, [0.2, 0.4, 0.6]),
    ],
)
def test_learning_rates(
    models: dict[str, Path], settings: dict[str, Any], total_steps: int, wanted: list[float]
) -> None:
    rates = learning_rates(models["qwen2"], OptimizerConfig(lr=0.1, **settings), total_steps)
    assert rates == pytest.approx([0.1 * rate for rate in wanted], rel=1e-12)
    assert min(rates) > 0


def test_the_settings_reach_adam(models: dict[str, Path]) -> None:
    def job(policy: Policy) -> list[tuple]:
        policy.scheduler.step(1)
        groups = policy.optimizer.param_groups
        return sorted(
            (g["weight_decay"], tuple(g["betas"]), sum(p.numel() for p in g["params"])) for g in groups
        )

    settings = OptimizerConfig(lr=0.1, weight_decay=0.3, beta2=0.95)
    ((vectors, matrices),) = on_layout(models["qwen2"], job, optimizer=settings)
    assert vectors[:2] == (0.0, (0.9, 0.95))  # norms and biases are not decayed
    assert matrices[:2] == (0.3, (0.9, 0.95))
    assert vectors[2] == 5 * 64 + 2 * 3 * 64 and CONSTANT_STEPS > 10**9


def test_gradients_above_the_limit_are_scaled(models: dict[str, Path]) -> None:
    def job(policy: Policy) -> tuple[float, float]:
        norm = nll_step(policy, first_update(policy))[1]
        clipped = sum(p.main_grad.square().sum() for p in policy.chunks[0].parameters())  # type: ignore[attr-defined]
        return norm, float(clipped) ** 0.5

    ((norm, clipped),) = on_layout(models["qwen2"], job, optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.5))
    assert norm > 1.0 and clipped == pytest.approx(0.5, rel=1e-5)
