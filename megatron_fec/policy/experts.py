"""Mixture of experts: what a checkpoint and a layout must be for it, and its settings in megatron-core's words."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_fec.config import ConfigError, PolicyConfig
from megatron_fec.policy_options import options_of_policy


def num_experts(hf_config: Any) -> int:
    """Of each layer; 0 in a dense model."""
    return getattr(hf_config, "num_experts", 0)


def expert_settings(hf_config: Any, policy: PolicyConfig, *, has_te: bool) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig; the bridge adds the sizes. {} for a dense model.

    has_te: whether the layers are Transformer Engine's, which brings the grouped products and the fused permutation.
    """
    if not num_experts(hf_config):
        return {}
    coefficient = options_of_policy(policy).router_load_balance
    return {
        "moe_token_dispatcher_type": "alltoall",  # of the tokens alone; no token is ever dropped
        "moe_expert_capacity_factor": None,
        "moe_router_load_balancing_type": "aux_loss" if coefficient else "none",
        "moe_aux_loss_coeff": coefficient * _aux_loss_factor(policy),
        "moe_router_dtype": "fp32",  # a logit in bf16 ties experts that are not equal
        "moe_grouped_gemm": has_te,
        "moe_permute_fusion": has_te,
        # mbridge turns these on for each mixture; without Transformer Engine they would be compiled for the CPU.
        "bias_activation_fusion": has_te,
        "bias_dropout_fusion": has_te,
        "persist_layer_norm": has_te,
    }


def mark_expert_gradients(model: torch.nn.Module) -> None:
    """Experts' gradients are summed over the ranks that hold the same experts, which are not those of the other weights.

    megatron-core 0.16 leaves the mark out where EP is 1, and then sums over the wrong ranks unless TP and ETP are equal.
    Before the model is wrapped by its DDP.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def check_expert_sizes(hf_config: Any, policy: PolicyConfig) -> None:
    """Experts and their width must divide; options of experts need some. Needs only the checkpoint's config.json."""
    options = options_of_policy(policy)
    count = num_experts(hf_config)
    if not count:
        _check_dense(policy)
        return
    for option, value, name in (
        ("expert_parallel", options.expert_parallel, "num_experts"),
        ("expert_tensor_parallel", options.expert_tensor_parallel, "moe_intermediate_size"),
    ):
        size = getattr(hf_config, name)
        if size % value:
            fitting = ", ".join(str(d) for d in range(1, 65) if size % d == 0)
            raise ConfigError(
                f"policy.options.{option}={value} must divide the checkpoint's {name}={size}. Use one of {fitting}."
            )
    if not 1 < hf_config.num_experts_per_tok <= count:
        raise ConfigError(
            f"the checkpoint's num_experts_per_tok={hf_config.num_experts_per_tok} must be from 2 to its "
            f"num_experts={count}: the gate of a single expert is always 1 and learns nothing. Use another checkpoint."
        )
    if policy.tensor_parallel > 1 and not policy.sequence_parallel:
        raise ConfigError(
            f"policy.tensor_parallel={policy.tensor_parallel} of a mixture of experts needs "
            "policy.sequence_parallel=true: each tensor rank would send the same tokens to the experts. Set it."
        )


def check_expert_world(policy: PolicyConfig, *, world_size: int) -> None:
    """The expert ranks of a pipeline stage must fill it, whatever its TP, CP and DP are."""
    options = options_of_policy(policy)
    stage = world_size // policy.pipeline_parallel
    expert_ranks = options.expert_parallel * options.expert_tensor_parallel
    if stage % expert_ranks:
        raise ConfigError(
            f"policy.options.expert_parallel={options.expert_parallel} x policy.options.expert_tensor_parallel="
            f"{options.expert_tensor_parallel} = {expert_ranks} must divide the {stage} ranks of a pipeline stage "
            f"({world_size} processes / policy.pipeline_parallel={policy.pipeline_parallel}). Start more processes "
            "or share the experts among fewer ranks."
        )


def _aux_loss_factor(policy: PolicyConfig) -> int:
    """Ranks of a micro-batch: megatron-core 0.16 scales the loss of balance by the tokens of one rank, 0.19 of all."""
    if "needs_dp_avg" in inspect.signature(TopKRouter.attach_and_log_load_balancing_loss).parameters:
        return 1
    return policy.tensor_parallel * policy.context_parallel


def _check_dense(policy: PolicyConfig) -> None:
    options = options_of_policy(policy)
    for name, neutral in (
        ("expert_parallel", 1),
        ("expert_tensor_parallel", 1),
        ("router", "live"),
        ("router_load_balance", 0.0),
    ):
        if (value := getattr(options, name)) != neutral:
            raise ConfigError(
                f"policy.options.{name}={value} needs a mixture of experts, and model.path is a dense model. "
                f"Set it to {neutral} or use another checkpoint."
            )
