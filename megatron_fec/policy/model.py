"""The policy network: megatron-core's GPTModel of a Hugging Face checkpoint, whose loss hook returns TokenStats."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core.llm_bridge import LLMBridge
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from mbridge.models.qwen3moe import Qwen3MoEBridge
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import is_pipeline_first_stage
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megatron_fec.config import ConfigError, PolicyConfig
from megatron_fec.policy.device import device
from megatron_fec.policy.experts import expert_settings, mark_expert_gradients
from megatron_fec.policy.layer_spec import block_spec, uses_transformer_engine
from megatron_fec.policy.megatron_settings import megatron_settings
from megatron_fec.policy.parallel import ParallelLayout
from megatron_fec.policy_options import PRECISIONS
from megatron_fec.types import MicroBatch, TokenStats
from megatron_fec.vocab_parallel.chunked_head import chunked_head_token_stats
from megatron_fec.vocab_parallel.token_stats import token_stats

BRIDGES: dict[str, type[LLMBridge]] = {
    "qwen2": Qwen2Bridge,
    "qwen3": Qwen3Bridge,
    "qwen3_moe": Qwen3MoEBridge,
    "llama": LLaMABridge,
}
DTYPES = {p: torch.float32 if p == "fp32" else torch.bfloat16 for p in PRECISIONS}  # of the weights
# What the model built here computes; a checkpoint that asks for something else would load and be another function.
FIXED_SETTINGS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    # Of a mixture of experts: all layers are sparse, and the gates of a token's experts add up to 1.
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
VOCAB_MULTIPLE = (
    64  # columns of a vocabulary shard are a multiple of this; the rest is padding, masked everywhere
)
# Where Transformer Engine is absent the norms are modules of their own, which mbridge must be told.
LOCAL_INPUT_NORM = {"input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"]}
LOCAL_MLP_NORM = {"pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"]}


class PolicyModel(GPTModel):
    """GPTModel that answers labels with the statistics of the local vocabulary shard instead of a cross entropy.

    They are made from the logits in the model's dtype, before Megatron's copy to fp32. All TP ranks hold the same ones.
    """

    true_vocab_size: int
    temperature: float
    tensor_group: dist.ProcessGroup
    logits_chunk_tokens: int | None
    second_moments: bool = False  # whether the statistics hold them; set before each pass by policy/step.py

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> TokenStats:  # type: ignore[override]
        """labels [1, T], logits [T, 1, V_local] -> [T] statistics; Megatron's hook, on the last stage."""
        return token_stats(
            logits.squeeze(1),
            labels.squeeze(0),
            **self._softmax_settings(),
            reuse_logits=True,  # they belong to this forward alone
        )

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """With logits_chunk_tokens, the last stage goes from hidden states to statistics without whole logits."""
        labels = kwargs["labels"]
        if self.logits_chunk_tokens is None or labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, **kwargs)
        # The module itself is not called, but its hooks are: DDP's, with overlap, waits for the gather of its weight.
        for hook in list(self.output_layer._forward_pre_hooks.values()):
            hook(self.output_layer, ())
        shares_weight = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shares_weight else self.output_layer.weight
        assert weight is not None
        # What ColumnParallelLinear does around its product: the gradient of the hidden states is summed over the group.
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.tensor_group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=self.tensor_group)
        return chunked_head_token_stats(
            hidden_states.squeeze(1),
            weight,
            labels.squeeze(0),
            **self._softmax_settings(),
            chunk_tokens=self.logits_chunk_tokens,
        )

    def _softmax_settings(self) -> dict[str, Any]:
        return {
            "group": self.tensor_group,
            "vocab_size": self.true_vocab_size,
            "temperature": self.temperature,
            "second_moments": self.second_moments,
        }


def load_hf_config(path: str) -> PretrainedConfig:
    """The checkpoint's configuration, of an architecture that is supported here."""
    try:
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # it would ask
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={path} holds no readable Hugging Face checkpoint: {str(error).splitlines()[0]} "
            "Give a folder with config.json and *.safetensors, or a hub name that this machine can reach."
        ) from error
    if hf_config.model_type not in BRIDGES:
        raise ConfigError(
            f"model.path={path} is a {hf_config.model_type} model; supported are {', '.join(BRIDGES)}."
        )
    for name, supported in FIXED_SETTINGS.items():
        if (value := getattr(hf_config, name, supported)) != supported:
            raise ConfigError(
                f"model.path={path} has {name}={value}; only {name}={supported} is supported. Use another checkpoint."
            )
    _rope_arguments(hf_config)  # raises for what GPTModel cannot compute
    return hf_config


def build_bridge(hf_config: PretrainedConfig, policy: PolicyConfig) -> LLMBridge:
    """The mbridge of this architecture, with Megatron's configuration of this layout in `bridge.config`."""
    # mbridge reads the name of transformers 4.
    hf_config.rope_theta = rope_parameters(hf_config)["rope_theta"]
    base = BRIDGES[hf_config.model_type]
    mapping = dict(base._DIRECT_MAPPING)
    if hf_config.tie_word_embeddings:  # mbridge's Llama does not know of tied ones, such as Llama 3.2 1B
        mapping["output_layer.weight"] = mapping["embedding.word_embeddings.weight"]
    # A class of our own: mbridge edits the mapping of a tied model in place, on the class.
    own: Any = type(base.__name__, (base,), {"_DIRECT_MAPPING": mapping})
    if not uses_transformer_engine():
        own._OTHER_MAPPING = LOCAL_INPUT_NORM
        own._MLP_MAPPING = base._MLP_MAPPING | LOCAL_MLP_NORM
    bridge = own(
        hf_config,
        dtype=DTYPES[policy.precision],
        make_vocab_size_divisible_by=VOCAB_MULTIPLE * policy.tensor_parallel,
    )
    bridge.vocab_size = hf_config.vocab_size
    multiple = bridge.make_vocab_size_divisible_by
    bridge.padded_vocab_size = math.ceil(hf_config.vocab_size / multiple) * multiple
    experts = expert_settings(hf_config, policy, has_te=uses_transformer_engine())
    bridge.set_extra_args(**megatron_settings(policy), **experts)
    return bridge


def build_model(
    bridge: LLMBridge,
    layout: ParallelLayout,
    *,
    temperature: float,
    vocab_size: int,
    logits_chunk_tokens: int | None = None,
    virtual_stage: int = 0,
) -> torch.nn.Module:
    """A chunk of this rank's stage and shard, weights not loaded; wrapped for bf16 where that is the precision.

    virtual_stage: number of the chunk, of layout.virtual_stages; the first of the first stage holds the embedding, the
    last of the last stage the head.
    vocab_size: ids with a token; the checkpoint's other rows are padding.
    """
    config: TransformerConfig = bridge.config
    hf_config: Any = bridge.hf_config  # which mbridge annotates as AutoConfig
    assert bridge.padded_vocab_size is not None
    vp_stage = virtual_stage if layout.virtual_stages > 1 else None  # megatron-core's number of a chunk
    model = PolicyModel(
        config=config,
        transformer_layer_spec=block_spec(config, vp_stage=vp_stage),
        vocab_size=bridge.padded_vocab_size,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=is_pipeline_first_stage() and virtual_stage == 0,
        post_process=layout.is_last_stage and virtual_stage == layout.virtual_stages - 1,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
        vp_stage=vp_stage,
        **_rope_arguments(hf_config),
    )
    model.true_vocab_size = min(vocab_size, hf_config.vocab_size)
    model.temperature = temperature
    model.tensor_group = layout.tensor_group
    model.logits_chunk_tokens = logits_chunk_tokens
    model.to(device())
    mark_expert_gradients(model)
    return Float16Module(config, model) if config.bf16 else model


def forward(model: torch.nn.Module, micro_batch: MicroBatch) -> TokenStats | Tensor:
    """TokenStats from the last chunk of the last stage, hidden states [T, 1, hidden] from the others."""
    return model(
        input_ids=micro_batch.tokens.unsqueeze(0),
        position_ids=micro_batch.position_ids.unsqueeze(0),
        attention_mask=None,
        labels=micro_batch.labels.unsqueeze(0),
        packed_seq_params=packed_seq_params(micro_batch),
    )


def packed_seq_params(micro_batch: MicroBatch) -> PackedSeqParams:
    """The packed sequences as attention and rotary embedding take them: starts and lengths before the context split.

    Transformer Engine's context-parallel attention reads the padded starts, and takes it for granted that nothing lies
    between sequences where they are the same tensor. So it is here: padding belongs to a sequence, whose real tokens do
    not see it under the causal mask, and the rest is a sequence of its own.
    """
    cu_seqlens = micro_batch.cu_seqlens
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=micro_batch.max_seqlen,
        max_seqlen_kv=micro_batch.max_seqlen,
    )


def rope_parameters(hf_config: PretrainedConfig) -> dict[str, Any]:
    """RoPE settings under one name: transformers 5 keeps them in rope_parameters, 4 in rope_theta and rope_scaling."""
    found = dict(getattr(hf_config, "rope_parameters", None) or {})
    if not found:
        found = {"rope_theta": hf_config.rope_theta, **(getattr(hf_config, "rope_scaling", None) or {})}
    return found


def _rope_arguments(hf_config: PretrainedConfig) -> dict[str, Any]:
    rope = rope_parameters(hf_config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rotary_base": rope["rope_theta"]}
    if kind == "linear":
        return {"rotary_base": rope["rope_theta"], "seq_len_interpolation_factor": rope["factor"]}
    # Megatron's rope_scaling is Llama 3's, with these three numbers fixed in its code.
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(rope[key] == value for key, value in fixed.items()):
        return {
            "rotary_base": rope["rope_theta"],
            "rope_scaling": True,
            "rope_scaling_factor": rope["factor"],
        }
    raise ConfigError(
        f"the checkpoint's rope_parameters={rope} are not supported; use default, linear or llama3."
    )
