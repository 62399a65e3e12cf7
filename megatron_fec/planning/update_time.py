"""Seconds of the passes over a step's tokens: log-probs and updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_fec.config import Config, PolicyConfig
from megatron_fec.planning import assumptions
from megatron_fec.planning.gpus import Gpu
from megatron_fec.planning.lengths import Lengths
from megatron_fec.planning.links import Links
from megatron_fec.planning.memory import Batch, optimizer_bytes
from megatron_fec.planning.shape import Shape
from megatron_fec.policy.sizes import StageMemory, data_parallel_size, expert_data_parallel_size
from megatron_fec.policy_options import FP8, micro_batch_multiple, options_of_policy

PACKING = 0.9  # share of policy.micro_batch_tokens that the fewest micro-batches which fit fill


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """Seconds of one pass over one update's tokens, by what they are spent on."""

    products: float
    tensor: float  # collectives of tensor, context and expert parallelism, pipeline sends
    bubble: float

    @property
    def total(self) -> float:
        return self.products + self.tensor + self.bubble


def batch_of_rank(config: Config, lengths: Lengths, *, world_size: int) -> Batch:
    """Of the fullest data-parallel rank in one update: its share of the tokens, or one long sequence."""
    policy = config.policy
    sequences = config.algorithm.prompts_per_update * config.rollout.group_size
    share = sequences / max(1, data_parallel_size(policy, world_size)) * lengths.sequence
    tokens = max(share, lengths.expected_longest(sequences) - 1)
    count = max(1, math.ceil(tokens / (policy.micro_batch_tokens * PACKING)))
    group = micro_batch_multiple(policy)
    return Batch(micro_batches=-(-count // group) * group, tokens=tokens)


def flops_per_token(shape: Shape, lengths: Lengths) -> tuple[float, float, float]:
    """Of one forward, over the whole model: (layers' products, attention's own under the causal mask, head)."""
    products = 2 * shape.layers * (shape.attention_weights + shape.feed_forward_weights)
    attention = 2 * shape.layers * shape.queries * lengths.context
    return products, attention, 2 * shape.head_weights


def pass_time(
    config: Config, shape: Shape, lengths: Lengths, batch: Batch, links: Links, *, trains: bool
) -> PassTime:
    """One forward over an update's tokens; with its backward and what that recomputes if it trains."""
    policy = config.policy
    options = options_of_policy(policy)
    stages, micro_batches = policy.pipeline_parallel, batch.micro_batches
    tokens = batch.tokens / micro_batches  # of a micro-batch, on all context ranks
    layer_seconds, attention_seconds, head_seconds = _product_seconds(
        policy, shape, lengths, links.gpu, tokens
    )
    again = float(options.recompute == "full")
    layer_passes = 3.0 + again if trains else 1.0
    more_attention = attention_seconds if trains and options.recompute == "selective" else 0.0
    head_passes = (4.0 if policy.logits_chunk_tokens is not None else 3.0) if trains else 1.0
    collective_passes = 2.0 + again if trains else 1.0
    stage = (layer_seconds * layer_passes + more_attention) / stages
    tensor = collective_passes * _collectives(policy, shape, links, tokens) / stages
    send = 2 * _send_seconds(policy, shape, links, tokens) * options.virtual_stages if stages > 1 else 0.0
    # The last stage also has the head: all others wait for it in each micro-batch.
    return PassTime(
        products=micro_batches * (stage + head_seconds * head_passes),
        tensor=micro_batches * (tensor + send),
        bubble=(stages - 1) * (stage + tensor + send) / options.virtual_stages,
    )


def reduction_time(policy: PolicyConfig, held: StageMemory, links: Links, *, world_size: int) -> float:
    """Seconds of an update's gradient sum and of the weights' way back, over data-parallel ranks."""
    experts = held.expert_parameters
    ranks = data_parallel_size(policy, world_size) * policy.context_parallel
    span = policy.tensor_parallel * ranks
    seconds = _reduction(policy, held.parameters - experts, ranks, span, links)
    seconds += _reduction(policy, experts, expert_data_parallel_size(policy, world_size), span, links)
    return seconds * (assumptions.OVERLAPPED if options_of_policy(policy).overlap else 1.0)


def optimizer_time(policy: PolicyConfig, held: StageMemory, gpu: Gpu) -> float:
    """Seconds of one AdamW step: each byte of its state is read and written once; on the host by its memory and PCIe."""
    on_host = held.optimizer * options_of_policy(policy).optimizer_on_host
    seconds = 2 * optimizer_bytes(policy, held) / gpu.hbm
    return seconds + 2 * on_host / assumptions.HOST_MEMORY + on_host / 2 / gpu.host_link


def _product_seconds(
    policy: PolicyConfig, shape: Shape, lengths: Lengths, gpu: Gpu, tokens: float
) -> tuple[float, float, float]:
    """Forward of a micro-batch: (all layers, attention's part of them, head), split over TP and CP."""
    ranks = policy.tensor_parallel * policy.context_parallel
    kind = "fp8" if policy.precision in FP8 else policy.precision
    rate = gpu.peak(policy.precision) * assumptions.MATMUL[kind] * ranks
    wide = "bf16" if kind == "fp8" else kind  # attention and head are not computed in FP8
    wide_rate = gpu.peak(wide) * assumptions.MATMUL[wide] * ranks
    products, attention, head = flops_per_token(shape, lengths)
    experts = 2 * shape.layers * shape.feed_forward_weights if shape.experts else 0.0
    layers = (products - experts) / rate + experts / (rate * assumptions.EXPERTS) + attention / wide_rate
    return tokens * layers, tokens * attention / wide_rate, tokens * head / wide_rate


def _collectives(policy: PolicyConfig, shape: Shape, links: Links, tokens: float) -> float:
    """Seconds of one direction through all layers, for a micro-batch."""
    options = options_of_policy(policy)
    tensor, context, element = policy.tensor_parallel, policy.context_parallel, _element(policy)
    own = tokens / context
    size = own * shape.hidden * element
    # Attention's and the feed-forward's; experts exchange tokens instead.
    sums = 1 if shape.experts else 2
    seconds = sums * links.all_reduce(size, tensor, tensor) if tensor > 1 else 0.0
    seconds *= assumptions.OVERLAPPED if options.tp_overlap else 1.0
    if context > 1:  # keys and values go round, under the products of attention
        ring = (context - 1) * own * 2 * shape.keys / tensor * element
        seconds += links.send(ring, tensor * context) * assumptions.OVERLAPPED
    if shape.experts and options.expert_parallel > 1:
        moved = size / tensor * shape.experts_per_token
        span = options.expert_parallel * options.expert_tensor_parallel
        seconds += 2 * links.gather(moved, options.expert_parallel, span)
    return shape.layers * seconds


def _send_seconds(policy: PolicyConfig, shape: Shape, links: Links, tokens: float) -> float:
    """To the next stage, which is taken to be on another node."""
    size = tokens / policy.context_parallel * shape.hidden * _element(policy)
    return links.send(size / policy.tensor_parallel, links.gpus_per_node + 1)


def _reduction(policy: PolicyConfig, parameters: int, ranks: int, span: int, links: Links) -> float:
    if ranks < 2:
        return 0.0
    if not policy.distributed_optimizer:
        return links.all_reduce(4 * parameters, ranks, span)
    return links.gather(4 * parameters, ranks, span) + links.gather(
        _element(policy) * parameters, ranks, span
    )


def _element(policy: PolicyConfig) -> int:
    return 4 if policy.precision == "fp32" else 2
