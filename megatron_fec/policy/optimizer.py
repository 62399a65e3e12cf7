"""Megatron's DDP, optimizer and learning-rate schedule for the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from megatron_fec.config import OptimizerConfig, PolicyConfig
from megatron_fec.policy.layout_settings import ddp_settings, optimizer_settings
from megatron_fec.policy.nonfinite import GradientWatch
from megatron_fec.policy.precision import ddp_precision, optimizer_precision

CONSTANT_STEPS = 2**31  # a decay that never arrives: megatron's constant schedule still asks for its length


def wrap_ddp(
    models: Sequence[torch.nn.Module],
    config: TransformerConfig,
    policy: PolicyConfig,
    gradients: GradientWatch,
) -> list[DistributedDataParallel]:
    """Each chunk in Megatron's DDP; gradients are summed in fp32 over DP x CP and divided by the global count in finalize.

    The schedules read from the configuration what they call, as megatron-core's own trainer sets it.
    """
    settings = ddp_settings(policy)
    chunks = [
        DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(**settings, **ddp_precision(policy)),
            module=model,
            disable_bucketing=number
            > 0,  # with overlap only the first chunk's communication is on the critical path
        )
        for number, model in enumerate(models)
    ]
    config.finalize_model_grads_func = gradients.finalize
    config.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
    if settings["align_param_gather"]:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])
    if (
        settings["overlap_grad_reduce"] and len(chunks) > 1
    ):  # all stages then start a chunk's reduction together
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in chunks])
    return chunks


def _one_or_all(functions: list[Callable]) -> Any:
    """megatron-core takes a list from the interleaved schedule alone."""
    return functions if len(functions) > 1 else functions[0]


def clip_gradients(optimizer: MegatronOptimizer, clip_grad: float) -> float:
    """The norm of all gradients of all ranks, after they are scaled down to clip_grad if it is more; 0 scales nothing.

    A mixture of experts has one optimizer for the experts and one for the rest, which megatron-core clips by their
    common norm inside its step() only.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(chained) == 1:
        return float(optimizer.clip_grad_norm(clip_grad))
    norm = float(optimizer.get_grad_norm())
    for each in chained:
        parameters = each.get_parameters()
        if parameters and clip_grad > 0:
            decoupled = each.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, clip_grad, norm, decoupled)
    return norm


def build_optimizer(
    chunks: list[DistributedDataParallel],
    policy: PolicyConfig,
    settings: OptimizerConfig,
    *,
    total_steps: int,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with fp32 master weights, and its schedule in steps (rollouts), of which step 0 is the first to count."""
    is_bf16 = policy.precision != "fp32"
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=0.0,
            weight_decay=settings.weight_decay,
            adam_beta2=settings.beta2,
            bf16=is_bf16,
            params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
            clip_grad=settings.clip_grad,
            **optimizer_settings(policy),
            **optimizer_precision(policy),
        ),
        list(chunks),
    )
    is_cosine = settings.lr_schedule == "cosine"
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=0.0,
        lr_warmup_steps=settings.warmup_steps,
        # megatron's count is one ahead of ours; 0 comes after the last step, which would else train nothing
        lr_decay_steps=max(total_steps, settings.warmup_steps) + 1 if is_cosine else CONSTANT_STEPS,
        lr_decay_style="cosine" if is_cosine else "constant",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=CONSTANT_STEPS,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
