"""Seconds that the engines sample for: prefill by its products, decoding by what a step reads from memory."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fec.config import Config
from megatron_fec.planning import assumptions
from megatron_fec.planning.gpus import Gpu
from megatron_fec.planning.lengths import BINS, Lengths
from megatron_fec.planning.shape import Shape

TAIL = 0.1  # share of the sequences that are left when the tail begins


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTime:
    prefill: float
    decode: float
    tail: float  # of decode: the time in which less than TAIL of an engine's sequences are left
    sequences: float  # of each engine in a step
    at_a_time: float  # of them, by cache and by vLLM's limit

    @property
    def total(self) -> float:
        return self.prefill + self.decode


def sampling_time(
    config: Config,
    shape: Shape,
    lengths: Lengths,
    *,
    gpu: Gpu,
    world_size: int,
    gpus_per_node: int,
    cached_tokens: float,
) -> SamplingTime:
    """Of one step. Sequences beyond those at a time follow as others end; then the last ones run out."""
    rollout = config.rollout
    engines = max(1, world_size // rollout.tensor_parallel)
    prompts = rollout.prompts_per_step / engines
    count = max(prompts * rollout.group_size, 1.0)
    mean_context = lengths.prompt + lengths.context / 2
    at_a_time = min(count, assumptions.ENGINE_SEQUENCES, max(1.0, cached_tokens / mean_context))

    def step(active: float, context: float) -> float:
        return _decode_step(
            config, shape, active, context, gpu=gpu, is_inside_node=rollout.tensor_parallel <= gpus_per_node
        )

    waiting = (count - at_a_time) * lengths.mean / at_a_time * step(at_a_time, mean_context)
    width = lengths.longest / BINS
    running = tail = 0.0
    for number in range(BINS):
        position = (number + 0.5) * width
        active = at_a_time * lengths.share_longer(position)
        seconds = width * step(max(active, 1.0), lengths.prompt + position)
        running += seconds
        tail += seconds if active < TAIL * at_a_time else 0.0
    rate = gpu.peak("bf16") * assumptions.MATMUL["bf16"] * rollout.tensor_parallel
    products = 2 * _weights_a_token_meets(shape) * prompts * lengths.prompt
    return SamplingTime(
        prefill=products / rate,
        decode=waiting + running,
        tail=tail,
        sequences=count,
        at_a_time=at_a_time,
    )


def _decode_step(
    config: Config, shape: Shape, active: float, context: float, *, gpu: Gpu, is_inside_node: bool
) -> float:
    """Seconds of one token for each active sequence."""
    rollout = config.rollout
    cache_element = 4 if config.policy.precision == "fp32" else 2
    element = 1 if rollout.precision == "fp8" else cache_element
    ranks = rollout.tensor_parallel
    read = element * _weights_read(shape, active) / ranks
    read += active * context * shape.cache_bytes(cache_element, ranks=ranks)
    memory = read / (gpu.hbm * assumptions.DECODE_BANDWIDTH)
    kind = "fp8" if rollout.precision == "fp8" else "bf16"
    rate = gpu.peak(kind) * assumptions.MATMUL[kind]
    products = 2 * _weights_a_token_meets(shape) * active / rollout.tensor_parallel / rate
    latency = assumptions.ALL_REDUCE_LATENCY if is_inside_node else assumptions.NETWORK_LATENCY
    collectives = 2 * shape.layers * latency if rollout.tensor_parallel > 1 else 0.0
    return max(memory, products) + assumptions.DECODE_OVERHEAD + collectives


def _weights_a_token_meets(shape: Shape) -> int:
    return shape.layers * (shape.attention_weights + shape.feed_forward_weights) + shape.head_weights


def _weights_read(shape: Shape, active: float) -> float:
    """Elements of the weights that a step over `active` sequences touches: of the experts, those that anyone chose."""
    if not shape.experts:
        return _weights_a_token_meets(shape)
    chosen = shape.experts * (1 - (1 - shape.experts_per_token / shape.experts) ** active)
    expert = 3 * shape.hidden * shape.feed_forward
    return shape.layers * (shape.attention_weights + chosen * expert) + shape.head_weights
