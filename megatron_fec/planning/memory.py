"""Bytes on the fullest GPU in each phase of a step, and in the host memory of a node.

Parameters, gradients and optimizer are those of policy/sizes.py, which is exact. What is on the GPU in which phase is
policy.options.offload's; the rest is stated in docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_fec.config import Config, PolicyConfig
from megatron_fec.planning import assumptions
from megatron_fec.planning.activations import (
    Layers,
    in_flight_layers,
    kept_layer_bytes,
    last_stage_bytes,
    working_bytes,
)
from megatron_fec.planning.gpus import Gpu
from megatron_fec.planning.shape import Shape
from megatron_fec.policy.sizes import MASTER_BYTES, MOMENT_BYTES, StageMemory, stage_memory
from megatron_fec.policy_options import FP8, options_of_policy

PHASES = ("sampling", "refit", "log-probs", "training", "checkpoint")
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "buffers",
    "engine weights",
    "KV cache",
    "other",
)
MOVED = {"none": (), "optimizer": ("optimizer",), "all": ("weights", "gradients", "optimizer")}
NEEDED = {  # of what policy.options.offload moves
    "sampling": (),
    "refit": ("weights",),
    "log-probs": ("weights",),
    "training": ("weights", "gradients", "optimizer"),
    "checkpoint": ("weights", "optimizer"),
}
MOMENTS = {"fp32": 8, "bf16_moments": 4, "fp8_moments": 2}  # bytes of Adam's two, a parameter


class Batch(NamedTuple):
    """What one data-parallel rank trains on in an update."""

    micro_batches: int
    tokens: float  # of all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by phase and part, each phase on its fullest pipeline stage."""

    phases: dict[str, dict[str, float]]
    host: dict[str, float]  # of a node
    cached_tokens: float  # that fit into an engine's KV cache

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        return max(self.phases, key=self.total)


def plan_memory(
    config: Config,
    hf_config: Any,
    shape: Shape,
    *,
    gpu: Gpu,
    world_size: int,
    gpus_per_node: int,
    batch: Batch,
    layers: Layers = "transformer_engine",
) -> MemoryPlan:
    """Of the configuration's own layout, which must divide."""
    policy = config.policy
    stages = [
        stage_memory(hf_config, policy, stage, world_size=world_size)
        for stage in range(policy.pipeline_parallel)
    ]
    engine = _engine(config, shape, gpu)
    candidates = [
        _phases(config, shape, stage, held, engine, batch, layers) for stage, held in enumerate(stages)
    ]
    fullest = {p: max((c[p] for c in candidates), key=lambda parts: sum(parts.values())) for p in PHASES}
    return MemoryPlan(
        phases=fullest,
        host=_host(config, stages[0], engine, gpus_per_node),
        cached_tokens=_cache_bytes(config, shape, gpu)
        / shape.cache_bytes(_cache_element(policy), ranks=config.rollout.tensor_parallel),
    )


def optimizer_bytes(policy: PolicyConfig, held: StageMemory) -> float:
    """On the GPU: stage_memory's, with the moments' precision and without the part that the host keeps."""
    options = options_of_policy(policy)
    master = 0 if policy.precision == "fp32" else MASTER_BYTES
    narrower = (master + MOMENTS[options.optimizer_precision]) / (master + MOMENT_BYTES)
    return held.optimizer * narrower * (1 - options.optimizer_on_host)


def weight_bytes(policy: PolicyConfig, held: StageMemory) -> float:
    """With the FP8 copies, data and transpose, that Transformer Engine keeps of its layers' weights."""
    if policy.precision not in FP8:
        return held.weights
    # fp8_params: the two copies are the weights. Embedding and head stay bf16, and are counted as if they did not.
    return held.weights if options_of_policy(policy).fp8_params else 2 * held.weights


def engine_weight_bytes(config: Config, shape: Shape) -> float:
    """On each GPU of an engine; embedding and head are never quantized."""
    ranks = config.rollout.tensor_parallel
    if config.rollout.precision == "fp8":
        ends = 2 * shape.head_weights
        return (shape.parameters - ends + 2 * ends) / ranks
    return shape.parameters * (4 if config.policy.precision == "fp32" else 2) / ranks


def _cache_element(policy: PolicyConfig) -> int:
    return 4 if policy.precision == "fp32" else 2


def _phases(
    config: Config,
    shape: Shape,
    stage: int,
    held: StageMemory,
    engine: dict[str, float],
    batch: Batch,
    layers: Layers,
) -> dict[str, dict[str, float]]:
    """One stage's bytes by phase and part."""
    policy = config.policy
    moved = MOVED[options_of_policy(policy).offload]
    policy_parts = {
        "weights": weight_bytes(policy, held),
        "gradients": float(held.gradients),
        "optimizer": optimizer_bytes(policy, held),
    }
    working = _working(config, shape, stage, held, batch, layers)
    phases = {}
    for phase in PHASES:
        parts = {n: b for n, b in policy_parts.items() if n not in moved or n in NEEDED[phase]}
        parts |= working.get(phase, {})
        parts |= {"other": assumptions.CONTEXT + _fragmentation(parts)}
        if phase == "sampling":
            parts |= engine | {"other": parts["other"] + engine["other"]}
        elif phase == "refit":
            parts |= {"engine weights": engine["engine weights"], "other": parts["other"] + engine["other"]}
        elif config.rollout.engine == "vllm":
            parts["other"] += assumptions.SLEEPING_ENGINE
        phases[phase] = parts
    return phases


def _working(
    config: Config, shape: Shape, stage: int, held: StageMemory, batch: Batch, layers: Layers
) -> dict[str, dict[str, float]]:
    """What the phases allocate and free again."""
    policy = config.policy
    element = 4 if policy.precision == "fp32" else 2
    tokens = policy.micro_batch_tokens / policy.context_parallel
    is_last = stage == policy.pipeline_parallel - 1
    moment = tokens * working_bytes(shape, policy, layers)
    kept = in_flight_layers(shape, policy, stage, batch.micro_batches) * kept_layer_bytes(
        shape, policy, layers
    )
    head = last_stage_bytes(shape, policy, layers) if is_last else 0.0
    largest = element * max(shape.head_weights, shape.hidden * shape.feed_forward)  # a whole tensor
    head_buffers = (element * shape.head_weights / policy.tensor_parallel) if is_last else 0.0
    if is_last and policy.logits_chunk_tokens is not None:
        head_buffers += 4 * tokens * shape.hidden  # the hidden states' gradient is summed in fp32
    forward = tokens * element * (shape.hidden + 3 * _wide(shape) / policy.tensor_parallel)
    return {
        "refit": {"buffers": assumptions.REFIT_BUCKETS * largest},
        "log-probs": {"activations": forward + tokens * head, "logits": float(held.logits)},
        "training": {
            "activations": tokens * (kept + head),
            "logits": float(held.logits),
            "buffers": moment + head_buffers,
        },
    }


def _wide(shape: Shape) -> int:
    return shape.feed_forward * max(1, shape.experts_per_token)


def _fragmentation(parts: dict[str, float]) -> float:
    return assumptions.FRAGMENTATION * sum(parts.get(n, 0.0) for n in ("activations", "logits", "buffers"))


def _engine(config: Config, shape: Shape, gpu: Gpu) -> dict[str, float]:
    """What an engine in the trainer's processes holds while it samples; nothing where it has GPUs of its own.

    rollout.gpu_memory_utilization is vLLM's share of the whole GPU; what its weights leave is cache.
    """
    if config.rollout.engine != "vllm":
        return {"engine weights": 0.0, "KV cache": 0.0, "other": 0.0}
    weights = engine_weight_bytes(config, shape)
    cache = _cache_bytes(config, shape, gpu)
    return {"engine weights": weights, "KV cache": cache, "other": assumptions.ENGINE_WORKSPACE}


def _cache_bytes(config: Config, shape: Shape, gpu: Gpu) -> float:
    """On each GPU of an engine."""
    budget = gpu.memory * config.rollout.gpu_memory_utilization
    return max(0.0, budget - engine_weight_bytes(config, shape) - assumptions.ENGINE_WORKSPACE)


def _host(
    config: Config, held: StageMemory, engine: dict[str, float], gpus_per_node: int
) -> dict[str, float]:
    """Bytes of a node's host memory, by what lies there."""
    policy = config.policy
    options = options_of_policy(policy)
    state = optimizer_bytes(policy, held)
    moved = {"optimizer": state, "weights": weight_bytes(policy, held), "gradients": 0.0}
    parts = {
        "offloaded policy": sum(moved[name] for name in MOVED[options.offload]),
        "optimizer on host": held.optimizer * options.optimizer_on_host,
        # Only after a validation is the next step sampled with weights that the engine has.
        "sleeping engine after a validation": engine["engine weights"] if config.trainer.eval_every else 0.0,
        "checkpoint under way": held.weights + state if config.trainer.async_save else 0.0,
    }
    return {name: size * gpus_per_node for name, size in parts.items() if size}
