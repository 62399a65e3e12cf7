"""Qwen3's mixture of experts: against transformers, and one update in layouts of EP, ETP, TP, PP, CP and DP.

As in tests/test_layouts.py all else than tokens and masks is fp32 sums in another order; the largest differences of all
cases on both megatron-core lines, on CPU, stand beside the tolerances.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from native_fixtures import LENGTH, PROMPTS, STOP, TEMPERATURE, uniforms
from policy_fixtures import (
    Outcome,
    TokenKey,
    assert_same_weights,
    build,
    copied_weights,
    fp32,
    hf_gradients,
    hf_tokens,
    make_groups,
    nll_step,
    old_logprob_table,
    on_layout,
    one_update,
    pack_for,
    save_model,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_fec.config import OptimizerConfig, PolicyConfig
from megatron_fec.policy import model as policy_model
from megatron_fec.policy import sizes as policy_sizes
from megatron_fec.policy.checkpoint import TrainerState, load_checkpoint
from megatron_fec.policy.checkpoint_save import save_checkpoint
from megatron_fec.policy.expert_weights import GroupedNames
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.nonfinite import NonFiniteError
from megatron_fec.policy.sampling import sample_responses
from megatron_fec.policy.sizes import parameter_count, places, stage_memory, stage_parameters
from megatron_fec.policy.step import Policy, cores
from megatron_fec.policy.weights import export_hf

TOKENS: Any = {"rel": 1e-6, "abs": 4e-6}  # log-prob and entropy; found 2.9e-6
METRICS: Any = {"rel": 2e-6, "abs": 1e-6}  # found 1.4e-7
GRADIENT_NORM: Any = {"rel": 2e-6}  # found 1.8e-7
NEW_WEIGHTS = 2e-6  # at a learning rate of 0.5; found 1.2e-7
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
PP2 = {"pipeline_parallel": 2}
CP2 = {"context_parallel": 2}
DISTRIBUTED = {"distributed_optimizer": True}


def options(**values: Any) -> dict[str, Any]:
    return {"options": values}


EP2, ETP2 = options(expert_parallel=2), options(expert_tensor_parallel=2)
# data parallel, settings; megatron-core's default order puts EP x ETP over TP first, then CP, then DP
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, EP2),
    (2, ETP2 | DISTRIBUTED),
    (4, EP2 | DISTRIBUTED),
    (1, TP2),  # each tensor rank holds all experts, and sees half of the tokens
    (1, TP2 | EP2),
    (1, TP2 | ETP2),
    (2, TP2 | DISTRIBUTED | options(expert_parallel=2, expert_tensor_parallel=2, recompute="full")),
    (2, PP2 | EP2 | {"micro_batch_tokens": 32}),
    (1, CP2 | EP2 | DISTRIBUTED),
    (1, CP2 | PP2 | ETP2 | {"micro_batch_tokens": 32}),
]
NAMES = [f"dp{dp}-{json.dumps(settings)}" for dp, settings in LAYOUTS]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("experts"), "qwen3_moe")


@pytest.fixture(scope="module", autouse=True)
def narrow_shards() -> Iterator[None]:
    """With shards as wide as the real ones the first would hold this small vocabulary alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_model, "VOCAB_MULTIPLE", 8)
        patch.setattr(policy_sizes, "VOCAB_MULTIPLE", 8)
        yield


def update(policy: Policy, table: Tensor, tokens: int) -> tuple[Outcome, dict[str, Tensor], int]:
    """What one update off policy did, the weights before it, and the parameters of this rank."""
    for group in policy.optimizer.param_groups:
        group["eps"] = 1.0  # Adam's first step is the gradient's sign, which turns rounding into a whole step
    before = copied_weights(policy)
    count = sum(parameter.numel() for parameter in cores(policy)[0].parameters())
    (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=tokens)
    return one_update(policy, batches, old_logprobs=table), before, count


@cache
def outcomes(model_dir: Path, number: int | None = None) -> list[tuple[Outcome, dict[str, Tensor], int]]:
    """Of each rank of LAYOUTS[number], or of one rank."""
    data_parallel, chosen = (1, {}) if number is None else LAYOUTS[number]
    settings = fp32(**chosen)
    table = old_logprob_table(model_dir)
    return on_layout(
        model_dir,
        lambda policy: update(policy, table, settings.micro_batch_tokens),
        settings,
        data_parallel=data_parallel,
        optimizer=OptimizerConfig(lr=0.5, clip_grad=1e9),
    )


def test_logprobs_and_entropy_are_those_of_transformers(model_dir: Path) -> None:
    ((outcome, before, count),) = outcomes(model_dir)
    wanted = hf_tokens(model_dir, make_groups(), torch.float32)
    assert outcome.tokens.keys() == wanted.keys()
    for key, pair in wanted.items():
        assert outcome.tokens[key][:2] == pytest.approx(pair, **TOKENS)
    names = {name for name in load_file(model_dir / "model.safetensors") if ".layers.0.mlp." in name}
    assert {f"model.layers.0.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up", "down")} < names
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert parameter_count(load_hf_config(str(model_dir))) == sum(p.numel() for p in model.parameters())
    assert count > parameter_count(load_hf_config(str(model_dir)))  # and the padding of the vocabulary
    for name, tensor in outcome.weights.items():
        assert (tensor - before[name]).abs().max() > 500 * NEW_WEIGHTS, name


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=NAMES)
def test_one_update_is_the_same_everywhere(model_dir: Path, number: int) -> None:
    """And the weights come out as they went in, and each rank holds the parameters that sizes.py counts."""
    _, chosen = LAYOUTS[number]
    ((wanted, _, _),) = outcomes(model_dir)
    ranks = outcomes(model_dir, number)
    saved = load_file(model_dir / "model.safetensors")
    hf_config = load_hf_config(str(model_dir))
    tokens: dict[TokenKey, tuple[float, float, bool]] = {}
    for place, (got, before, count) in zip(places(fp32(**chosen), len(ranks)), ranks, strict=True):
        tokens |= got.tokens
        assert_same_weights(before, saved)
        assert got.metrics == pytest.approx(wanted.metrics, **METRICS)
        assert got.grad_norm == pytest.approx(wanted.grad_norm, **GRADIENT_NORM)
        assert_same_weights(got.weights, wanted.weights, atol=NEW_WEIGHTS)
        assert count == stage_parameters(hf_config, fp32(**chosen), place.pipeline)
    assert tokens.keys() == wanted.tokens.keys()
    for key, (logprob, entropy, is_clipped) in wanted.tokens.items():
        assert tokens[key][:2] == pytest.approx((logprob, entropy), **TOKENS)
        assert tokens[key][2] == is_clipped


@pytest.mark.parametrize("clip_grad", [1e9, 0.1])
def test_gradients_are_clipped_by_the_norm_of_experts_and_all_else(model_dir: Path, clip_grad: float) -> None:
    def job(policy: Policy) -> tuple[float, dict[str, Tensor]]:
        (batches,) = pack_for(policy, make_groups())
        _, norm = nll_step(policy, batches)
        return norm, hf_gradients(policy)

    optimizer = OptimizerConfig(lr=0.0, clip_grad=clip_grad)
    for norm, gradients in on_layout(model_dir, job, fp32(**EP2), data_parallel=2, optimizer=optimizer):
        whole = math.sqrt(sum(float(g.detach().double().square().sum()) for g in gradients.values()))
        assert norm > 0.2  # so that 0.1 cuts
        assert whole == pytest.approx(min(norm, clip_grad), rel=1e-4)


def test_bf16_over_shared_experts_is_bf16_on_one_rank(model_dir: Path) -> None:
    def job(policy: Policy) -> list[tuple[float, float]]:
        (batches,) = pack_for(policy, make_groups())
        return [nll_step(policy, batches) for _ in range(2)]

    def run(data_parallel: int, **chosen: Any) -> list[tuple[float, float]]:
        settings = PolicyConfig(
            precision="bf16", distributed_optimizer=True, micro_batch_tokens=512, **chosen
        )
        return on_layout(model_dir, job, settings, data_parallel=data_parallel)[0]

    for got, wanted in zip(run(2, **EP2), run(1), strict=True):
        assert got == pytest.approx(wanted, rel=0.02)  # 8 bits of mantissa; a wrong reduction is off by half


def test_an_exported_folder_is_the_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    settings = fp32(**TP2, **EP2)
    on_layout(model_dir, lambda policy: export_hf(policy, model_dir, target), settings)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (target, model_dir))
    assert_same_weights(ours, theirs)
    assert load_hf_config(str(target)).num_experts == 4


def test_the_experts_have_the_names_of_grouped_products(model_dir: Path) -> None:
    """That mbridge maps and Transformer Engine's TEGroupedMLP has; the local layers' are another list."""

    def job(policy: Policy) -> set[str]:
        names = {name for name, _ in GroupedNames(cores(policy)[0]).named_parameters()}
        return {name for name in names if ".layers.1.mlp." in name}

    for names in on_layout(model_dir, job, fp32(**EP2), data_parallel=2):
        parts = {f"experts.linear_fc{part}.weight{expert}" for part in (1, 2) for expert in (0, 1)}
        assert names == {f"decoder.layers.1.mlp.{part}" for part in parts | {"router.weight"}}


def test_a_gradient_that_is_not_finite_is_found_in_an_expert(model_dir: Path) -> None:
    def job(policy: Policy) -> str:
        (batches,) = pack_for(policy, make_groups())
        if policy.layout.data_parallel_rank == 1:
            for name, parameter in cores(policy)[0].named_parameters():
                if name.endswith("layers.0.mlp.experts.local_experts.1.linear_fc2.weight"):
                    parameter.register_hook(lambda gradient: gradient * math.nan)
        before = copied_weights(policy)
        with pytest.raises(NonFiniteError) as caught:
            nll_step(policy, batches)
        assert_same_weights(copied_weights(policy), before)
        return str(caught.value)

    for message in on_layout(model_dir, job, fp32(**EP2), data_parallel=2):
        assert "layers.0.mlp.experts.local_experts.1.linear_fc2.weight, first on rank 1" in message


def allocated(policy: Policy) -> tuple[int, int, int]:
    """Bytes of weights, of gradient buffers, and of the optimizer's moments, after a step."""
    (batches,) = pack_for(policy, make_groups())
    nll_step(policy, batches)
    weights = sum(p.numel() * p.element_size() for p in cores(policy)[0].parameters())
    buffers: Any = policy.chunks[0].buffers + policy.chunks[0].expert_parallel_buffers  # type: ignore[operator]
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
    inner: Any = [each.optimizer for each in policy.optimizer.chained_optimizers]  # type: ignore[attr-defined]
    states = [value for each in inner for state in each.state.values() for value in state.values()]
    return weights, gradients, sum(v.numel() * v.element_size() for v in states if v.numel() > 1)


def test_bytes_of_shared_experts_are_those_of_ddp_and_optimizer(model_dir: Path) -> None:
    """Four ranks share the optimizer's state of the rest, two that of the same experts."""
    settings = fp32(**EP2, **DISTRIBUTED)
    memory = stage_memory(load_hf_config(str(model_dir)), settings, 0, world_size=4)
    assert memory.expert_parameters == 2 * 2 * 3 * 40 * 48
    ranks = on_layout(model_dir, allocated, settings, data_parallel=4)
    for weights, gradients, _ in ranks:
        assert weights == memory.weights
        assert gradients == pytest.approx(memory.gradients, rel=0.02)  # megatron pads each buffer
    held = sum(optimizer for _, _, optimizer in ranks)
    assert held == pytest.approx(4 * memory.optimizer, rel=0.03)
    assert memory.optimizer < 0.4 * memory.optimizer_plain


def test_resuming_changes_no_bit_and_another_layout_goes_on(model_dir: Path, tmp_path: Path) -> None:
    settings = fp32(**TP2, **DISTRIBUTED, **options(expert_parallel=2, expert_tensor_parallel=2))
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=3)

    def steps(policy: Policy, count: int) -> list[tuple[float, float]]:
        (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=64)
        return [nll_step(policy, batches) for _ in range(count)]

    def job(policy: Policy) -> list[tuple[float, float]]:
        steps(policy, 2)
        state = TrainerState(step=2, consumed_samples=2, weight_version=2, schedule={})
        path = save_checkpoint(policy, tmp_path, state, keep=2)
        expected, weights = steps(policy, 2), copied_weights(policy)
        again = build(model_dir, settings, layout=policy.layout, optimizer=optimizer)
        steps(again, 1)  # of which nothing may stay
        load_checkpoint(again, path)
        assert steps(again, 2) == expected
        assert_same_weights(copied_weights(again), weights)
        return expected

    def elsewhere(policy: Policy) -> list[tuple[float, float]]:
        load_checkpoint(policy, tmp_path / "step_000002")
        return steps(policy, 2)

    wanted = on_layout(model_dir, job, settings, data_parallel=2, optimizer=optimizer)[0]
    other = fp32(**EP2, **DISTRIBUTED)
    for got in on_layout(model_dir, elsewhere, other, data_parallel=2, optimizer=optimizer):
        for pair, expected in zip(got, wanted, strict=True):
            assert pair == pytest.approx(expected, rel=1e-6)


@cache
def sampled(model_dir: Path, data_parallel: int, *layout: tuple[str, Any]) -> list[dict[int, list[int]]]:
    """Of each rank: the ids by prompt. The second data-parallel rank has one prompt only, and is done long before."""

    def job(policy: Policy) -> dict[int, list[int]]:
        rank = policy.layout.data_parallel_rank
        mine = list(range(len(PROMPTS)))[rank :: policy.layout.data_parallel][: 1 if rank else None]
        ids, _ = sample_responses(
            policy,
            [PROMPTS[i] for i in mine],
            uniforms=uniforms(len(PROMPTS))[mine],
            stop_id=STOP,
            temperature=TEMPERATURE,
        )
        return dict(zip(mine, ids, strict=True))

    return on_layout(model_dir, job, fp32(**dict(layout)), data_parallel=data_parallel)


@pytest.mark.parametrize(
    ("data_parallel", "chosen"), [(2, PP2 | EP2), (2, TP2 | options(expert_parallel=4)), (1, TP2 | ETP2)]
)
def test_ranks_that_share_experts_sample_as_one_does(
    model_dir: Path, data_parallel: int, chosen: dict[str, Any]
) -> None:
    (wanted,) = sampled(model_dir, 1)
    assert max(map(len, wanted.values())) == LENGTH
    for responses in sampled.__wrapped__(model_dir, data_parallel, *chosen.items()):
        assert responses == {number: wanted[number] for number in responses}
