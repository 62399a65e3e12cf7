"""Bytes that the forward of a micro-batch keeps for its backward, by layer, recompute mode and pipeline stage.

Two sets of layers. LOCAL: megatron-core's own with our norm and attention, unfused; its formula is held against the real
model on CPU (tests/test_policy_activations.py, within 10 %). TRANSFORMER_ENGINE: fused norms and flash attention; the
same accounting with the tensors that Transformer Engine's modules save, after Korthikanti et al. 2022 (arXiv 2205.05198)
section 4, without dropout, with grouped keys, SwiGLU and no attention matrix. It has not been measured.
"""

from __future__ import annotations

from typing import Literal

from megatron_fec.config import PolicyConfig
from megatron_fec.planning.shape import Shape
from megatron_fec.policy_options import options_of_policy

Layers = Literal["transformer_engine", "local"]
# Widths of the feed-forward that a gated unit keeps: the first product's two, the activated gate, the other
# half after its (zero) offset, and what the second product reads.
GATED_UNIT = 5
FUSED_UNIT = (
    3  # of experts under Transformer Engine: the first product's two, and what the second product reads
)
STATISTIC = 4  # bytes of a norm's or softmax's number for one token, fp32
TOKEN = 44  # bytes of a token's id, label and log-probability sums


def layer_bytes(shape: Shape, policy: PolicyConfig, layers: Layers) -> float:
    """Of one layer and one token of this rank's part, without recompute."""
    attention = core_attention_bytes(shape, policy, layers)
    return (
        attention + _norms(shape, policy, layers) + _projections(shape, policy, layers) + _mlp(shape, policy)
    )


def kept_layer_bytes(shape: Shape, policy: PolicyConfig, layers: Layers) -> float:
    """As layer_bytes, under policy.options.recompute."""
    element, mode = _element(policy), options_of_policy(policy).recompute
    if mode == "full":
        return element * shape.hidden / _sequence(policy)
    whole = layer_bytes(shape, policy, layers)
    if mode == "none":
        return whole
    return whole - core_attention_bytes(shape, policy, layers) + _core_inputs(shape, policy, layers)


def core_attention_bytes(shape: Shape, policy: PolicyConfig, layers: Layers) -> float:
    """What attention itself keeps: its three inputs, its output and the softmax's sums."""
    tensor, element = policy.tensor_parallel, _element(policy)
    keys = shape.queries if layers == "local" else shape.keys  # repeated for each query head, or not
    return (element * (2 * shape.queries + 2 * keys) + STATISTIC * shape.heads) / tensor


def in_flight_layers(shape: Shape, policy: PolicyConfig, stage: int, micro_batches: int) -> float:
    """Layers x micro-batches whose activations a pipeline stage holds at its fullest: 1F1B, or interleaved chunks.

    As megatron-core's schedules count their warm-up; Korthikanti et al., section 4.2.3.
    """
    stages, chunks = policy.pipeline_parallel, options_of_policy(policy).virtual_stages
    layers = shape.layers / (stages * chunks)
    if chunks == 1:
        return layers * min(stages - stage, micro_batches)
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages
    return layers * min(warm_up + 1, micro_batches * chunks)


def last_stage_bytes(shape: Shape, policy: PolicyConfig, layers: Layers) -> float:
    """Beside the layers and the logits, for one token: the last norm with the output layer's input, angles, sums."""
    return _norm(shape, policy, layers) + 4 * shape.head + TOKEN


def working_bytes(shape: Shape, policy: PolicyConfig, layers: Layers) -> float:
    """For one token: what a layer's forward or backward holds for a moment, or a whole layer that is recomputed."""
    element, tensor = _element(policy), policy.tensor_parallel
    moment = element * (2 * shape.hidden + 3 * shape.feed_forward * max(1, shape.experts_per_token) / tensor)
    again = layer_bytes(shape, policy, layers) if options_of_policy(policy).recompute == "full" else 0.0
    return moment + again


def _element(policy: PolicyConfig) -> int:
    return 4 if policy.precision == "fp32" else 2


def _sequence(policy: PolicyConfig) -> int:
    """Parts into which sequence parallelism cuts what tensor parallelism leaves whole."""
    return policy.tensor_parallel if policy.sequence_parallel else 1


def _norm(shape: Shape, policy: PolicyConfig, layers: Layers) -> float:
    """One norm: what it reads, what it makes of it, and its output, which the next product reads."""
    element = _element(policy)
    # Unfused: the fp32 input, its normalized form, the output.
    width = 4 + 2 * element if layers == "local" else 2 * element
    return (width * shape.hidden + STATISTIC) / _sequence(policy)


def _norms(shape: Shape, policy: PolicyConfig, layers: Layers) -> float:
    both = 2 * _norm(shape, policy, layers)
    if not shape.has_qk_norm:
        return both
    element, width = _element(policy), shape.queries + shape.keys
    joint = shape.queries + 2 * shape.keys  # queries, keys and values lie in one buffer, kept whole
    if layers == "transformer_engine":
        per_head = element * joint
    elif element == 4:  # queries are copied out of the joint buffer, keys are a part of it
        per_head = element * (shape.queries + width + joint)
    else:
        per_head = (4 + element) * width
    return both + per_head / policy.tensor_parallel


def _projections(shape: Shape, policy: PolicyConfig, layers: Layers) -> float:
    """The output projection's input, and RoPE's sines and cosines where they are not fused."""
    if layers == "transformer_engine":
        return 0.0  # the input is attention's output
    element = _element(policy)
    return element * (shape.queries / policy.tensor_parallel + 4 * shape.head)


def _mlp(shape: Shape, policy: PolicyConfig) -> float:
    element, options = _element(policy), options_of_policy(policy)
    if not shape.experts:
        return element * GATED_UNIT * shape.feed_forward / policy.tensor_parallel
    # Tokens are spread evenly over the experts; each comes experts_per_token times. The logits, their softmax and the
    # map of the router in fp32. SwiGLU and the router's weight on it are one kernel (policy/experts.py asks for it).
    copies = shape.experts_per_token / _sequence(policy)
    unit = FUSED_UNIT * shape.feed_forward
    reads = shape.hidden * options.expert_tensor_parallel
    return element * copies * (reads + unit) + 3 * STATISTIC * shape.experts / _sequence(policy)


def _core_inputs(shape: Shape, policy: PolicyConfig, layers: Layers) -> float:
    """What a recomputed attention keeps: its inputs, and with them the joint buffer that the values are a part of."""
    element, tensor = _element(policy), policy.tensor_parallel
    if layers == "transformer_engine":
        return (
            element * (2 * shape.queries + 2 * shape.keys) / tensor
        )  # the output stays: the projection reads it
    joint = shape.queries + 2 * shape.keys
    kept = shape.queries + shape.keys + (0 if shape.has_qk_norm and element == 4 else joint)
    return element * kept / tensor
