"""Seconds of one training step by part, and what follows from them: tokens a second, MFU, GPU hours, dollars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_fec.algorithm.strategies import needs_reference
from megatron_fec.config import Config
from megatron_fec.planning import assumptions
from megatron_fec.planning.lengths import Lengths
from megatron_fec.planning.links import Links
from megatron_fec.planning.memory import MOVED, Batch, optimizer_bytes, weight_bytes
from megatron_fec.planning.sampling_time import SamplingTime
from megatron_fec.planning.shape import Shape
from megatron_fec.planning.update_time import (
    PassTime,
    flops_per_token,
    optimizer_time,
    pass_time,
    reduction_time,
)
from megatron_fec.policy.sizes import StageMemory, stage_memory
from megatron_fec.policy_options import options_of_policy


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds; the names of `parts` are those that docs/planning.md explains."""

    parts: dict[str, float]  # rollout, refit, log-probs, training, offload, checkpoint
    sampling: SamplingTime
    update: PassTime  # of one update
    reduction: float  # of one update: gradients and weights over data-parallel ranks
    micro_batches: int  # of one update
    tokens: float  # of all sequences of a step, prompts included
    response_tokens: float
    model_flops: float  # of the updates, without recompute
    gpus: int  # paid for: the policy's, and the engines' where they have their own
    is_ahead: bool  # the next step is sampled while this one trains

    @property
    def total(self) -> float:
        if not self.is_ahead:
            return sum(self.parts.values())
        return max(self.parts["rollout"], sum(self.parts.values()) - self.parts["rollout"])

    @property
    def tokens_per_second(self) -> float:
        return self.response_tokens / self.total

    def mfu(self, peak: float, *, gpus: int, whole_step: bool) -> float:
        """Share of the GPUs' peak that the updates' products reach, in training or over the whole step."""
        seconds = self.total if whole_step else self.parts["training"]
        return self.model_flops / (seconds * gpus * peak)

    def gpu_hours(self, steps: int) -> float:
        return self.total * steps * self.gpus / 3600


def step_time(
    config: Config,
    hf_config: Any,
    shape: Shape,
    lengths: Lengths,
    *,
    links: Links,
    world_size: int,
    batch: Batch,
    sampling: SamplingTime,
) -> StepTime:
    """Of the configuration's own layout."""
    policy, updates = config.policy, config.updates_per_rollout
    stages = range(policy.pipeline_parallel)
    held = max(
        (stage_memory(hf_config, policy, stage, world_size=world_size) for stage in stages),
        key=lambda stage: stage.parameters,
    )
    forward = pass_time(config, shape, lengths, batch, links, trains=False)
    update = pass_time(config, shape, lengths, batch, links, trains=True)
    reduction = reduction_time(policy, held, links, world_size=world_size)
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    passes = updates / config.algorithm.epochs * (2 if needs_reference(config.algorithm) else 1)
    parts = {
        "rollout": sampling.total,
        "refit": _refit_time(config, shape, links),
        "log-probs": passes * forward.total,
        "training": updates * (update.total + reduction + optimizer_time(policy, held, links.gpu)),
        "offload": _offload_time(config, held, links),
        "checkpoint": _checkpoint_time(config, shape, world_size, links),
    }
    tokens = rollouts * lengths.sequence
    return StepTime(
        parts=parts,
        sampling=sampling,
        update=update,
        reduction=reduction,
        micro_batches=batch.micro_batches,
        tokens=tokens,
        response_tokens=rollouts * lengths.mean,
        model_flops=3 * sum(flops_per_token(shape, lengths)) * tokens * config.algorithm.epochs,
        gpus=world_size * (2 if config.rollout.engine == "servers" else 1),
        is_ahead=config.rollout.max_lag > 0,
    )


def _refit_time(config: Config, shape: Shape, links: Links) -> float:
    """Every rank sees every tensor whole, and its engine keeps a part."""
    policy = config.policy
    options = options_of_policy(policy)
    span = max(policy.tensor_parallel, options.expert_parallel * options.expert_tensor_parallel)
    if policy.pipeline_parallel > 1 or config.rollout.engine == "servers":
        span = links.gpus_per_node + 1
    size = shape.parameters * (4 if policy.precision == "fp32" else 2)
    return links.send(size, span) + shape.tensors * assumptions.TENSOR_OVERHEAD


def _offload_time(config: Config, held: StageMemory, links: Links) -> float:
    """What policy.options.offload moves, to the host and back; gradients are dropped and filled anew."""
    sizes = {
        "weights": weight_bytes(config.policy, held),
        "optimizer": optimizer_bytes(config.policy, held),
        "gradients": 0.0,
    }
    moved = sum(sizes[name] for name in MOVED[options_of_policy(config.policy).offload])
    return 2 * moved / (links.gpu.host_link * assumptions.LINK)


def _checkpoint_time(config: Config, shape: Shape, world_size: int, links: Links) -> float:
    """Each step's share of a save; one in the background costs the copy to the host only."""
    settings, precision = config.trainer, config.policy.precision
    if not settings.save_every:
        return 0.0
    size = shape.parameters * (12 if precision == "fp32" else 14)  # weights, master weights, both moments
    nodes = -(-world_size // links.gpus_per_node)
    disk = min(assumptions.DISK, nodes * assumptions.DISK_PER_NODE)
    if settings.async_save:
        return size / (world_size * links.gpu.host_link) / settings.save_every
    return size / disk / settings.save_every
