"""Parameters and bytes of every rank from a checkpoint's config.json alone: what Megatron will allocate, and where.

Counts of parameters are exact (tests/test_sizes.py builds the models). Megatron pads each gradient buffer to a multiple
of a few hundred elements and rounds the shards of the distributed optimizer up; that is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_fec.config import PolicyConfig
from megatron_fec.policy.experts import num_experts
from megatron_fec.policy.model import DTYPES, VOCAB_MULTIPLE
from megatron_fec.policy_options import options_of_policy

GRADIENT_BYTES = 4  # summed in fp32
MASTER_BYTES = 4  # of bf16 weights; fp32 weights are their own
MOMENT_BYTES = 8  # of Adam, both


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank stands in Megatron's default order tp-cp-ep-dp-pp, the first axis fastest."""

    rank: int
    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage; activations are not among them."""

    parameters: int
    expert_parameters: int  # of them, the experts', whose data-parallel ranks are others
    weights: int
    gradients: int
    optimizer: int  # as configured
    optimizer_distributed: int
    optimizer_plain: int
    logits: int  # of one micro-batch, in the model's dtype; 0 before the last stage

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.logits


def places(policy: PolicyConfig, world_size: int) -> list[Place]:
    """Every rank's place; world_size must be a multiple of TP x PP x CP."""
    tensor, context = policy.tensor_parallel, policy.context_parallel
    data = data_parallel_size(policy, world_size)
    return [
        Place(
            rank=rank,
            tensor=rank % tensor,
            context=rank // tensor % context,
            data=rank // (tensor * context) % data,
            pipeline=rank // (tensor * context * data),
        )
        for rank in range(world_size)
    ]


def data_parallel_size(policy: PolicyConfig, world_size: int) -> int:
    return world_size // (policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel)


def expert_data_parallel_size(policy: PolicyConfig, world_size: int) -> int:
    """Ranks that hold the same part of the same experts; the ranks of TP and CP are among those that divide them."""
    options = options_of_policy(policy)
    return world_size // (options.expert_tensor_parallel * options.expert_parallel * policy.pipeline_parallel)


def parameter_count(hf_config: Any) -> int:
    """Of the checkpoint as Hugging Face counts them: rows of padding left out, a tied output counted once."""
    embedding = hf_config.vocab_size * hf_config.hidden_size
    copies = 1 if hf_config.tie_word_embeddings else 2
    layer = _layer_parameters(hf_config, tensor_parallel=1)
    if num_experts(hf_config):
        layer += num_experts(hf_config) * _expert_parameters(hf_config)
    return copies * embedding + hf_config.num_hidden_layers * layer + hf_config.hidden_size


def stage_parameters(hf_config: Any, policy: PolicyConfig, stage: int) -> int:
    """On each rank of a pipeline stage, with the vocabulary padded as Megatron pads it."""
    is_first, is_last = stage == 0, stage == policy.pipeline_parallel - 1
    embedding = _shard_width(hf_config, policy) * hf_config.hidden_size
    layers = hf_config.num_hidden_layers // policy.pipeline_parallel
    count = layers * _layer_parameters(hf_config, policy.tensor_parallel)
    count += stage_expert_parameters(hf_config, policy)
    if is_first:
        count += embedding
    if is_last:
        count += hf_config.hidden_size  # the last norm
        if not (is_first and hf_config.tie_word_embeddings):  # a tied output on another stage is a copy
            count += embedding
    return count


def stage_expert_parameters(hf_config: Any, policy: PolicyConfig) -> int:
    """Those of stage_parameters that are the experts', without their router; the same on each stage."""
    if not num_experts(hf_config):
        return 0
    options = options_of_policy(policy)
    layers = hf_config.num_hidden_layers // policy.pipeline_parallel
    experts = layers * (num_experts(hf_config) // options.expert_parallel)
    return experts * (_expert_parameters(hf_config) // options.expert_tensor_parallel)


def stage_memory(hf_config: Any, policy: PolicyConfig, stage: int, *, world_size: int) -> StageMemory:
    """What Megatron's model, DDP and AdamW hold on each rank of a stage, and the logits of a micro-batch."""
    count, experts = stage_parameters(hf_config, policy, stage), stage_expert_parameters(hf_config, policy)
    element = DTYPES[policy.precision].itemsize
    state = MOMENT_BYTES + (MASTER_BYTES if policy.precision != "fp32" else 0)  # of a parameter
    shards = data_parallel_size(policy, world_size) * policy.context_parallel
    distributed = -(-(count - experts) * state // shards)
    distributed += -(-experts * state // expert_data_parallel_size(policy, world_size))
    state *= count
    return StageMemory(
        parameters=count,
        expert_parameters=experts,
        weights=count * element,
        gradients=count * GRADIENT_BYTES,
        optimizer=distributed if policy.distributed_optimizer else state,
        optimizer_distributed=distributed,
        optimizer_plain=state,
        logits=_logits(hf_config, policy) * element if stage == policy.pipeline_parallel - 1 else 0,
    )


def _expert_parameters(hf_config: Any) -> int:
    return 3 * hf_config.moe_intermediate_size * hf_config.hidden_size


def _layer_parameters(hf_config: Any, tensor_parallel: int) -> int:
    """Of one layer on a tensor rank, without its experts."""
    hidden, tp = hf_config.hidden_size, tensor_parallel
    heads, key_values = hf_config.num_attention_heads, hf_config.num_key_value_heads
    head = getattr(hf_config, "head_dim", None) or hidden // heads
    projections = (heads + 2 * key_values) * head // tp
    count = projections * hidden + heads * head // tp * hidden  # queries, keys and values; and the way back
    if num_experts(hf_config):
        count += num_experts(hf_config) * hidden  # the router, whole on each rank
    else:
        count += 3 * (hf_config.intermediate_size // tp) * hidden
    count += 2 * hidden  # the norms
    if hf_config.model_type == "qwen2":
        count += projections  # their biases
    if hf_config.model_type in ("qwen3", "qwen3_moe"):
        count += 2 * head  # norms of queries and keys
    return count


def _shard_width(hf_config: Any, policy: PolicyConfig) -> int:
    """Rows of the embedding on a tensor rank, padding included."""
    return -(-hf_config.vocab_size // (VOCAB_MULTIPLE * policy.tensor_parallel)) * VOCAB_MULTIPLE


def _logits(hf_config: Any, policy: PolicyConfig) -> int:
    """Elements that are in memory at one time."""
    tokens = policy.micro_batch_tokens // policy.context_parallel
    if policy.logits_chunk_tokens is not None:
        tokens = min(tokens, policy.logits_chunk_tokens)
    return tokens * _shard_width(hf_config, policy)
