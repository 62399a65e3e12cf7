"""One configuration on given nodes: what the run itself would refuse, the memory, the time, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_fec.config import Config, ConfigError
from megatron_fec.planning import assumptions
from megatron_fec.planning.activations import Layers
from megatron_fec.planning.gpus import Gpu
from megatron_fec.planning.lengths import Lengths, response_lengths
from megatron_fec.planning.links import Links
from megatron_fec.planning.memory import MemoryPlan, plan_memory
from megatron_fec.planning.sampling_time import sampling_time
from megatron_fec.planning.shape import Shape
from megatron_fec.planning.step_time import StepTime, step_time
from megatron_fec.planning.update_time import batch_of_rank
from megatron_fec.policy.parallel import check_world
from megatron_fec.policy.sizes import data_parallel_size
from megatron_fec.preflight import check_batch, check_engines, check_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def links(self) -> Links:
        return Links(gpu=self.gpu, gpus_per_node=self.gpus_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The checkpoint, in its own words and in the planner's."""

    hf_config: Any
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    config: Config
    machine: Machine
    memory: MemoryPlan
    time: StepTime
    obstacles: list[str]  # why it does not fit into memory; empty where it does

    @property
    def fits(self) -> bool:
        return not self.obstacles

    @property
    def fullest_bytes(self) -> float:
        return self.memory.total(self.memory.fullest)


def lengths_of(config: Config, response_tokens: float | None = None) -> Lengths:
    """response_tokens: mean of a response; else the assumed share of the longest."""
    longest = config.rollout.max_response_tokens
    if response_tokens is not None and not 1 <= response_tokens <= longest:
        raise ConfigError(
            f"--response-tokens {response_tokens:g} must be from 1 to rollout.max_response_tokens={longest}."
        )
    return response_lengths(
        prompt=max(1.0, assumptions.MEAN_PROMPT * config.rollout.max_prompt_tokens),
        mean=response_tokens or max(1.0, assumptions.MEAN_RESPONSE * longest),
        longest=longest,
    )


def check_layout(config: Config, hf_config: Any, *, world_size: int) -> None:
    """Raises ConfigError, in the run's own words, for a layout that does not divide or a sequence that is too long."""
    check_world(config.policy, world_size=world_size)
    check_model(config, hf_config)
    if config.rollout.engine == "vllm":
        check_engines(config.rollout.tensor_parallel, world_size=world_size)


def starving(config: Config, *, world_size: int) -> str | None:
    """The run's error where an update has too few sequences for the data-parallel ranks."""
    try:
        check_batch(config, data_parallel_size(config.policy, world_size))
    except ConfigError as error:
        return str(error)
    return None


def make_plan(
    config: Config,
    model: Model,
    machine: Machine,
    lengths: Lengths,
    *,
    layers: Layers = "transformer_engine",
) -> Plan:
    """Of a layout that check_layout has seen."""
    hf_config, shape, world_size = model.hf_config, model.shape, machine.world_size
    batch = batch_of_rank(config, lengths, world_size=world_size)
    memory = plan_memory(
        config,
        hf_config,
        shape,
        gpu=machine.gpu,
        world_size=world_size,
        gpus_per_node=machine.gpus_per_node,
        batch=batch,
        layers=layers,
    )
    sampling = sampling_time(
        config,
        shape,
        lengths,
        gpu=machine.gpu,
        world_size=world_size,
        gpus_per_node=machine.gpus_per_node,
        cached_tokens=memory.cached_tokens,
    )
    time = step_time(
        config,
        hf_config,
        shape,
        lengths,
        links=machine.links,
        world_size=world_size,
        batch=batch,
        sampling=sampling,
    )
    obstacles = _obstacles(config, machine.gpu, memory)
    return Plan(config=config, machine=machine, memory=memory, time=time, obstacles=obstacles)


def _obstacles(config: Config, gpu: Gpu, memory: MemoryPlan) -> list[str]:
    over = [
        f"{phase} takes {memory.total(phase) / 1e9:.1f} GB of {gpu.memory / 1e9:.0f}, "
        f"{(memory.total(phase) - gpu.memory) / 1e9:.1f} GB too much; most of it {_largest(memory.phases[phase])}"
        for phase in memory.phases
        if memory.total(phase) > gpu.memory
    ]
    rollout = config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if rollout.engine != "native" and memory.cached_tokens < longest:
        over.append(
            f"the KV cache of an engine holds {memory.cached_tokens:,.0f} tokens at rollout.gpu_memory_utilization="
            f"{rollout.gpu_memory_utilization}, and one sequence has {longest}"
        )
    return over


def _largest(parts: dict[str, float]) -> str:
    name = max(parts, key=lambda part: parts[part])
    return f"{name}, {parts[name] / 1e9:.1f} GB"
