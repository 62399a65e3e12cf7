"""Virtual pipeline stages: where the layers lie, and that checkpoints, weights, samples and errors do not know of them.

That an update is the same as on one rank is in test_layouts.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from policy_fixtures import (
    assert_same_weights,
    build,
    copied_weights,
    fp32,
    make_groups,
    nll_step,
    on_layout,
    pack_for,
    save_model,
)
from ranks import run_on_ranks
from safetensors.torch import load_file
from torch import Tensor

from megatron_fec.config import ConfigError, OptimizerConfig, PolicyConfig
from megatron_fec.policy.checkpoint import TrainerState, load_checkpoint, load_model_only
from megatron_fec.policy.checkpoint_save import save_checkpoint
from megatron_fec.policy.nonfinite import NonFiniteError
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.reference import ReferencePolicy
from megatron_fec.policy.sampling import sample_responses
from megatron_fec.policy.step import Policy, compute_logprobs, cores, token_statistics

OPTIMIZER = OptimizerConfig(lr=1e-2, lr_schedule="cosine", warmup_steps=3)
STATE = TrainerState(step=2, consumed_samples=14, weight_version=2, schedule={})
PP2: dict[str, Any] = {"pipeline_parallel": 2}
VIRTUAL: dict[str, Any] = {**PP2, "options": {"virtual_stages": 2}}
KINDS = ("qwen3_deep", "llama_tied_deep")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [5, 6]]
Steps = list[tuple[float, float]]  # loss, gradient norm


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def steps(policy: Policy, count: int, *, micro_batch_tokens: int = 32) -> Steps:
    (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=micro_batch_tokens)
    return [nll_step(policy, batches) for _ in range(count)]


def test_each_rank_holds_every_other_piece_of_the_model(models: dict[str, Path]) -> None:
    def job(policy: Policy) -> list[tuple[list[Any], bool, bool]]:
        return [
            ([layer.layer_number for layer in core.decoder.layers], core.pre_process, core.post_process)
            for core in cores(policy)
        ]

    found = on_layout(models["qwen3_deep"], job, fp32(**VIRTUAL))
    assert found[0] == [([1], True, False), ([3], False, False)]
    assert found[1] == [([2], False, False), ([4], False, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_out_as_they_went_in(models: dict[str, Path], kind: str) -> None:
    wanted = load_file(models[kind] / "model.safetensors")
    for weights in on_layout(models[kind], copied_weights, fp32(**VIRTUAL, tensor_parallel=2)):
        assert_same_weights(weights, wanted)


def test_few_sequences_still_make_a_group_of_micro_batches(models: dict[str, Path]) -> None:
    """Two stages take two micro-batches at a time, though one would hold all: the second one is the same on one rank."""
    groups = make_groups(prompts=1, group_size=1)  # one sequence: the other micro-batch has no response token

    def job(policy: Policy) -> tuple[int, Any]:
        (batches,) = pack_for(policy, groups)
        (filled,), sums = compute_logprobs(policy, [batches])
        return len(batches), (sums.means(), nll_step(policy, filled), copied_weights(policy))

    ((alone, wanted),) = on_layout(models["qwen3_deep"], job)
    assert alone == 1
    for number, got in on_layout(models["qwen3_deep"], job, fp32(**VIRTUAL)):
        assert number == 2
        assert got[0] == pytest.approx(wanted[0], rel=1e-6)
        assert got[1] == pytest.approx(wanted[1], rel=1e-5)


def test_statistics_are_made_of_any_number_of_micro_batches(models: dict[str, Path]) -> None:
    def job(policy: Policy) -> list[list[Tensor]]:
        (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=32)
        passes = [
            token_statistics(policy, some, second_moments=False)
            for some in (batches, batches[:1], batches[:3])
        ]
        return [[stats.logprobs for _, stats in pairs if stats is not None] for pairs in passes]

    first_stage, (wanted, one, three) = on_layout(models["qwen3_deep"], job, fp32(**VIRTUAL))
    assert first_stage == [[], [], []] and len(wanted) >= 4
    torch.testing.assert_close([one, three], [wanted[:1], wanted[:3]], rtol=0, atol=0)


def test_resuming_changes_no_bit(models: dict[str, Path], tmp_path: Path) -> None:
    settings = fp32(**VIRTUAL, distributed_optimizer=True)

    def job(policy: Policy) -> Any:
        steps(policy, 2)
        path = save_checkpoint(policy, tmp_path, STATE, keep=2)
        wanted = steps(policy, 2), copied_weights(policy)
        again = build(models["qwen3_deep"], settings, layout=policy.layout, optimizer=OPTIMIZER)
        steps(again, 1)
        load_checkpoint(again, path)
        return wanted, (steps(again, 2), copied_weights(again))

    for wanted, got in on_layout(models["qwen3_deep"], job, settings, optimizer=OPTIMIZER):
        assert got[0] == wanted[0] and wanted[0][0] != wanted[0][1]
        assert_same_weights(got[1], wanted[1])


@pytest.mark.parametrize(
    ("saved_in", "loaded_in", "kind", "is_distributed"),
    [
        (VIRTUAL, PP2, "qwen3_deep", True),
        ({}, VIRTUAL, "llama_tied_deep", True),
        (VIRTUAL, {}, "qwen3_deep", False),
    ],
    ids=["virtual-pp2", "one-virtual-tied", "virtual-one-plain"],
)
def test_another_layout_goes_on_with_the_same_losses(
    models: dict[str, Path],
    tmp_path: Path,
    saved_in: dict[str, Any],
    loaded_in: dict[str, Any],
    kind: str,
    is_distributed: bool,
) -> None:
    def save(policy: Policy) -> tuple[dict[str, Tensor], Steps]:
        steps(policy, 2)
        save_checkpoint(policy, tmp_path, STATE, keep=2)
        return copied_weights(policy), steps(policy, 3)

    def load(policy: Policy) -> tuple[dict[str, Tensor], Steps]:
        load_model_only(policy, tmp_path / "step_000002")
        weights = copied_weights(policy)
        load_checkpoint(policy, tmp_path / "step_000002")
        assert_same_weights(copied_weights(policy), weights)
        return weights, steps(policy, 3)

    def run(job: Callable[[Policy], Any], layout: dict[str, Any]) -> list[Any]:
        settings = fp32(**layout, distributed_optimizer=is_distributed)
        return on_layout(models[kind], job, settings, optimizer=OPTIMIZER)

    weights, wanted = run(save, saved_in)[0]
    for got_weights, got in run(load, loaded_in):
        assert_same_weights(got_weights, weights)
        assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in wanted], rel=1e-6)
        assert [norm for _, norm in got] == pytest.approx([norm for _, norm in wanted], rel=1e-5)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_native_sampler_draws_the_same_tokens(models: dict[str, Path], tensor_parallel: int) -> None:
    """The hidden states pass each stage twice for every token."""
    numbers = torch.rand(len(PROMPTS), 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def job(policy: Policy) -> tuple[list[list[int]], list[list[float]]]:
        return sample_responses(policy, PROMPTS, uniforms=numbers, stop_id=36, temperature=0.8)

    ((wanted, logprobs),) = on_layout(models["qwen3_deep"], job)
    settings = fp32(**VIRTUAL, tensor_parallel=tensor_parallel, sequence_parallel=tensor_parallel > 1)
    for got, got_logprobs in on_layout(models["qwen3_deep"], job, settings):
        assert got == wanted
        for row, expected in zip(got_logprobs, logprobs, strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_reference_policy_takes_the_place_of_all_chunks(models: dict[str, Path]) -> None:
    def job(policy: Policy) -> list[tuple[float, float]]:
        updates = pack_for(policy, make_groups(), micro_batch_tokens=32)
        first, _ = compute_logprobs(policy, updates)
        reference = ReferencePolicy(policy)
        steps(policy, 2)
        trained = copied_weights(policy)
        filled = reference.fill(policy, updates)
        assert_same_weights(copied_weights(policy), trained)
        second, _ = compute_logprobs(policy, updates)
        if not policy.layout.is_last_stage:
            return []
        triples: Any = zip(filled[0], first[0], second[0], strict=True)
        return [
            (
                float((mb.reference_logprobs - before.old_logprobs).abs().max()),
                float((after.old_logprobs - before.old_logprobs).abs().max()),
            )
            for mb, before, after in triples
        ]

    first_stage, last_stage = on_layout(models["qwen3_deep"], job, fp32(**VIRTUAL))
    assert first_stage == [] and len(last_stage) >= 2
    for to_reference, to_trained in last_stage:
        assert to_reference == 0.0 and to_trained > 0.01


@pytest.mark.parametrize(("chunk", "rank"), [(1, 0), (0, 1)])
def test_a_gradient_that_is_not_finite_is_found_in_every_chunk(
    models: dict[str, Path], chunk: int, rank: int
) -> None:
    """Backward goes through chunks and stages: the rank that has it first is named, though all before it inherit it."""

    def poison(layer: Any, inputs: Any, output: tuple[Tensor, Any]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: gradient * math.inf)

    def job(policy: Policy) -> str:
        if dist.get_rank() == rank:
            layer: Any = cores(policy)[chunk].decoder.layers[0]
            layer.register_forward_hook(poison)
        with pytest.raises(NonFiniteError) as error:
            steps(policy, 1)
        return str(error.value)

    found = on_layout(models["qwen3_deep"], job, fp32(**VIRTUAL))
    name = "module.decoder.layers.0.mlp.linear_fc2.weight"
    assert found == [f"not finite: the gradient of {name}, first on rank {rank}"] * 2


def test_virtual_stages_that_do_not_fit_stop_on_every_rank(models: dict[str, Path]) -> None:
    settings = PolicyConfig(
        precision="fp32", pipeline_parallel=2, micro_batch_tokens=64, options={"virtual_stages": 4}
    )

    def job(rank: int) -> str:
        layout = initialize_parallel(settings, seed=3)
        with pytest.raises(ConfigError) as error:
            build(models["qwen3_deep"], settings, layout=layout)
        return str(error.value)

    messages = run_on_ranks(2, job)
    assert messages[0] == messages[1]
    assert "pipeline_parallel=2 x policy.options.virtual_stages=4 = 8 exceeds" in messages[0]
