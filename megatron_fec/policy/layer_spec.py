"""The layers of the policy: Transformer Engine's where they can run, else megatron-core's local ones with our norm."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_fec.policy.local_layers import PackedAttention, RMSNorm

try:
    import transformer_engine  # noqa: F401  # pyright: ignore[reportMissingImports]  # an optional extra

    HAS_TRANSFORMER_ENGINE = True
except ImportError:
    HAS_TRANSFORMER_ENGINE = False


def uses_transformer_engine() -> bool:
    """Whether the layers are Transformer Engine's; it cannot run without a GPU."""
    return HAS_TRANSFORMER_ENGINE and torch.cuda.is_available()


def block_spec(config: TransformerConfig, *, vp_stage: int | None = None) -> Any:
    """Transformer Engine's layers where they can run, else the local ones with our norm and attention."""
    if uses_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer: Any = spec.submodules
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm
    if (
        config.num_moe_experts
    ):  # the names of Transformer Engine's layers, so that each reads the other's checkpoints
        layer.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    norm: Any = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage), layer_norm=norm
    )
