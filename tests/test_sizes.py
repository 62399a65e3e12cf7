"""Parameters, bytes and places of every rank against the Megatron models and groups that a run really builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from policy_fixtures import fp32, make_groups, nll_step, on_layout, pack_for, save_model
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM

from megatron_fec.config import PolicyConfig
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.sizes import parameter_count, places, stage_memory, stage_parameters
from megatron_fec.policy.step import Policy, unwrapped

KINDS = ["qwen2", "tied", "qwen3", "llama", "llama_tied"]
SLACK = 0.02  # of a tiny buffer that Megatron pads to a multiple of some hundred elements


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_of_a_checkpoint_are_counted(models: dict[str, Path], kind: str):
    model = AutoModelForCausalLM.from_pretrained(models[kind])
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(load_hf_config(str(models[kind]))) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_the_parameters_of_each_rank_are_those_of_the_built_model(
    models: dict[str, Path], kind: str, tensor: int, pipeline: int
):
    settings = fp32(tensor_parallel=tensor, pipeline_parallel=pipeline)

    def job(policy: Policy) -> int:
        return sum(parameter.numel() for parameter in unwrapped(policy.chunks[0]).parameters())

    hf_config = load_hf_config(str(models[kind]))
    expected = [
        stage_parameters(hf_config, settings, place.pipeline) for place in places(settings, tensor * pipeline)
    ]
    assert on_layout(models[kind], job, settings) == expected


def allocated(policy: Policy) -> tuple[int, int, int]:
    """Bytes of weights, gradient buffers, and all that the optimizer holds beside them, after a step."""
    nll_step(policy, pack_for(policy, make_groups())[0])
    parameters = list(unwrapped(policy.chunks[0]).parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    buffers: Any = policy.chunks[0].buffers  # Megatron's, which hide those of nn.Module
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
    inner = [outer.optimizer for outer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])]
    masters = [p for each in inner for group in each.param_groups for p in group["params"]]
    moments = [
        value
        for each in inner
        for state in each.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    copies = [
        p for p in masters if p.dtype != parameters[0].dtype
    ]  # in fp32 they are the weights, or parts of them
    held = [*moments, *copies]
    return weights, gradients, sum(value.numel() * value.element_size() for value in held)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_distributed", [False, True])
def test_bytes_are_those_of_ddp_and_optimizer(models: dict[str, Path], precision: str, is_distributed: bool):
    settings = PolicyConfig(precision=precision, distributed_optimizer=is_distributed, micro_batch_tokens=512)
    ranks = on_layout(models["qwen2"], allocated, settings, data_parallel=2)
    memory = stage_memory(load_hf_config(str(models["qwen2"])), settings, 0, world_size=2)
    for weights, gradients, _ in ranks:
        assert weights == memory.weights
        assert gradients == pytest.approx(memory.gradients, rel=SLACK)
    optimizer = sum(held for _, _, held in ranks)
    assert optimizer == pytest.approx(2 * memory.optimizer, rel=SLACK)
    assert memory.optimizer == (memory.optimizer_distributed if is_distributed else memory.optimizer_plain)
    assert memory.optimizer_plain == 2 * memory.optimizer_distributed
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.logits


def test_logits_are_a_part_of_the_micro_batch_on_the_last_stage(models: dict[str, Path]):
    hf_config = load_hf_config(str(models["llama"]))  # a vocabulary of less than 64 rows, padded to 64 a rank
    whole = PolicyConfig(pipeline_parallel=2, context_parallel=2, tensor_parallel=2, micro_batch_tokens=512)
    memory = [stage_memory(hf_config, whole, stage, world_size=8) for stage in range(2)]
    assert [stage.logits for stage in memory] == [0, 256 * 64 * 2]
    whole.logits_chunk_tokens = 32
    assert stage_memory(hf_config, whole, 1, world_size=8).logits == 32 * 64 * 2


@pytest.mark.parametrize(("tensor", "context", "pipeline"), [(2, 1, 2), (2, 2, 1), (1, 2, 2), (4, 1, 1)])
def test_places_are_those_of_megatrons_groups(tensor: int, context: int, pipeline: int):
    settings = PolicyConfig(tensor_parallel=tensor, context_parallel=context, pipeline_parallel=pipeline)

    def job(rank: int) -> tuple[int, ...]:
        layout = initialize_parallel(settings, seed=3)
        return (
            rank,
            dist.get_rank(layout.tensor_group),
            layout.context_parallel_rank,
            layout.data_parallel_rank,
            parallel_state.get_pipeline_model_parallel_rank(),
        )

    expected = [(p.rank, p.tensor, p.context, p.data, p.pipeline) for p in places(settings, 8)]
    assert run_on_ranks(8, job) == expected
