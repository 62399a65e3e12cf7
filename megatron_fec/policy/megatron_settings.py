"""The policy's settings in megatron-core's words."""

from __future__ import annotations

from typing import Any

from megatron_fec.config import PolicyConfig
from megatron_fec.policy.kernels import kernel_settings
from megatron_fec.policy.layout_settings import layout_settings
from megatron_fec.policy.precision import transformer_precision
from megatron_fec.policy_options import options_of_policy


def megatron_settings(policy: PolicyConfig) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig that the policy's settings decide; the bridge adds the checkpoint's."""
    settings: dict[str, Any] = {
        "sequence_parallel": policy.sequence_parallel,
        "calculate_per_token_loss": True,  # gradients are divided once, by the count over all ranks
        "variable_seq_lengths": False,  # packing gives all micro-batches of an update one length
        "masked_softmax_fusion": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **transformer_precision(policy),
        **kernel_settings(policy),
    }
    recompute = options_of_policy(policy).recompute
    if recompute == "full":
        settings |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif recompute == "selective":
        settings |= {"recompute_granularity": "selective"}
    return settings | layout_settings(policy)
