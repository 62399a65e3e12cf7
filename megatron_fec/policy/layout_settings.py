"""The layout and speed options in megatron-core's words: field values of its dataclasses, and what excludes each other.

Each function is pure, {field: value}; docs/parallelism.md says what the options do. megatron_settings.py has the rest of
the TransformerConfig.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_fec.config import ConfigError, PolicyConfig
from megatron_fec.policy_options import options_of_policy

# Of Adam's two moments. Transformer Engine keeps FP8 as bytes with a scale of its own for each tensor.
MOMENT_DTYPES = {"bf16_moments": torch.bfloat16, "fp8_moments": torch.uint8}


def layout_settings(policy: PolicyConfig) -> dict[str, Any]:
    """Fields of TransformerConfig; the sizes of the layout itself come from megatron-core's process groups."""
    options = options_of_policy(policy)
    settings: dict[str, Any] = {}
    if options.tp_overlap:
        settings["tp_comm_overlap"] = True
    if policy.context_parallel > 1:
        settings["cp_comm_type"] = (
            "p2p"  # keys and values go round a ring while attention runs on those that are there
        )
    if options.virtual_stages > 1:
        # The interleaved schedule sends between the same two ranks for several chunks: never in one batch of transfers.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings


def ddp_settings(policy: PolicyConfig) -> dict[str, Any]:
    """Fields of DistributedDataParallelConfig."""
    options = options_of_policy(policy)
    gathers = options.overlap and policy.distributed_optimizer
    return {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": policy.distributed_optimizer,
        "overlap_grad_reduce": options.overlap,
        "overlap_param_gather": gathers,
        # All stages then start their gathers together; the schedule does it, and only the interleaved one can.
        "align_param_gather": gathers and options.virtual_stages > 1,
    }


def optimizer_settings(policy: PolicyConfig) -> dict[str, Any]:
    """Fields of OptimizerConfig that the policy's options decide."""
    options = options_of_policy(policy)
    settings: dict[str, Any] = {
        "use_distributed_optimizer": policy.distributed_optimizer,
        "overlap_param_gather": ddp_settings(policy)["overlap_param_gather"],
    }
    if options.optimizer_precision in MOMENT_DTYPES:
        dtype = MOMENT_DTYPES[options.optimizer_precision]
        settings |= {
            "use_precision_aware_optimizer": True,
            "exp_avg_dtype": dtype,
            "exp_avg_sq_dtype": dtype,
            "main_params_dtype": torch.float32,
            "main_grads_dtype": torch.float32,
        }
    if options.optimizer_on_host > 0:
        settings |= {
            "use_precision_aware_optimizer": True,  # megatron-core's host optimizer reads gradients only that way
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": options.optimizer_on_host,
            "overlap_cpu_optimizer_d2h_h2d": options.overlap,
        }
    return settings


def check_devices(policy: PolicyConfig, *, has_gpu: bool, has_transformer_engine: bool) -> None:
    """Raises ConfigError for an option that this machine cannot honour; the same on every rank."""
    options = options_of_policy(policy)
    runs_transformer_engine = has_gpu and has_transformer_engine
    missing = "Transformer Engine is not installed" if has_gpu else "this machine has no GPU"
    if policy.context_parallel > 1 and has_gpu and not has_transformer_engine:
        raise ConfigError(
            f"policy.context_parallel={policy.context_parallel} needs Transformer Engine's attention on a GPU, and it is "
            "not installed: every rank would attend for the whole sequence. Install the extra gpu, or set it to 1."
        )
    if options.tp_overlap and not runs_transformer_engine:
        raise ConfigError(
            f"policy.options.tp_overlap=true needs Transformer Engine's layers on GPUs, and {missing}. Set it to false"
            f"{', or install the extra gpu' if has_gpu else ''}."
        )
    if options.optimizer_precision != "fp32" and not runs_transformer_engine:
        raise ConfigError(
            f"policy.options.optimizer_precision={options.optimizer_precision} needs Transformer Engine's FusedAdam on "
            f"GPUs, and {missing}. Set it to fp32{', or install the extra gpu' if has_gpu else ''}."
        )
    if options.optimizer_on_host > 0 and not has_gpu:
        raise ConfigError(
            f"policy.options.optimizer_on_host={options.optimizer_on_host} moves the optimizer from a GPU to the host, and "
            "this machine has no GPU: it is on the host already. Set it to 0."
        )
    if options.optimizer_on_host > 0 and not has_transformer_engine:  # whose version megatron-core asks for
        raise ConfigError(
            f"policy.options.optimizer_on_host={options.optimizer_on_host} needs Transformer Engine, which is not "
            "installed. Set it to 0, or install the extra gpu."
        )
