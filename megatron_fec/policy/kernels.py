"""Kernels of others: what is importable, what the settings make of it, and what a run tells of it at its start.

megatron-core chooses some by import and silently; here the choice is a pure function of what is installed, and an option
that names a kernel which is absent is an error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import get_te_version

from megatron_fec.config import ConfigError, PolicyConfig
from megatron_fec.policy.layer_spec import uses_transformer_engine
from megatron_fec.policy.layout_settings import check_devices
from megatron_fec.policy_options import options_of_policy
from megatron_fec.precision_rules import Version, check_gpu, version_of
from megatron_fec.vocab_parallel.token_stats import kernel_for

UNFUSED_PACKED = (2, 11)  # Transformer Engine's unfused attention takes packed sequences from there on
# The distribution of each generation of flash-attention that Transformer Engine looks for.
FLASH_ATTENTION = ("flash-attn-4", "flash-attn-3", "flash-attn")
WGRAD = "fused_weight_gradient_mlp_cuda"  # apex's; megatron-core's output layer demands it for the fusion


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What this process can compute with; None or False where it is not there."""

    capability: Version | None  # of the GPU
    cuda: str | None  # that torch was built with
    transformer_engine: str | None  # version; None without a GPU too, where it cannot run
    engine_is_broken: bool = False  # it is installed, and its import fails
    flash_attention: str | None  # name and version
    fused_rope: bool  # Transformer Engine's, over packed sequences
    fused_wgrad: bool  # weight gradients that are added to the fp32 buffer as they are made

    @staticmethod
    def here() -> Installed:
        """Of this process."""
        gpu = torch.cuda.is_available()
        engine = uses_transformer_engine() and HAVE_TE
        return Installed(
            capability=torch.cuda.get_device_capability() if gpu else None,
            cuda=torch.version.cuda,
            transformer_engine=str(get_te_version()) if engine else None,
            engine_is_broken=gpu
            and not HAVE_TE
            and importlib.util.find_spec("transformer_engine") is not None,
            flash_attention=next((f"{n} {v}" for n in FLASH_ATTENTION if (v := _version(n))), None)
            if gpu
            else None,
            fused_rope=engine and rope_utils.fused_apply_rotary_pos_emb_thd is not None,
            fused_wgrad=gpu and importlib.util.find_spec(WGRAD) is not None,
        )


def kernel_settings(policy: PolicyConfig, installed: Installed | None = None) -> dict[str, Any]:
    """Fields of TransformerConfig: the fused kernels that are there, and the attention that the options name.

    megatron-core turns attention_backend into Transformer Engine's NVTE_* variables when it builds the model.
    """
    found = installed or Installed.here()
    settings: dict[str, Any] = {
        "apply_rope_fusion": found.fused_rope,
        "gradient_accumulation_fusion": found.fused_wgrad and found.transformer_engine is not None,
    }
    if found.transformer_engine is not None:
        settings["attention_backend"] = AttnBackend[options_of_policy(policy).attention]
    return settings


def check_kernels(policy: PolicyConfig, installed: Installed | None = None) -> None:
    """Raises ConfigError for a precision, an attention or a layout that this process cannot compute."""
    found = installed or Installed.here()
    if found.engine_is_broken:
        raise ConfigError(
            "transformer-engine is installed, and megatron-core could not import it: `python -c 'import "
            "transformer_engine.pytorch.fp8'` says why. Install the build for this torch and CUDA, or uninstall it."
        )
    check_gpu(
        policy.precision,
        capability=found.capability,
        te_version=found.transformer_engine,
        cuda_version=found.cuda,
    )
    check_devices(
        policy,
        has_gpu=found.capability is not None,
        has_transformer_engine=found.transformer_engine is not None,
    )
    attention = options_of_policy(policy).attention
    setting = f"policy.options.attention={attention}"
    if found.transformer_engine is None:
        if attention != "auto":
            raise ConfigError(
                f"{setting} is a choice of Transformer Engine, which is not in use here. Install the extra gpu and start "
                "it on a GPU, or set it to auto."
            )
        return
    unfused_packs = version_of(found.transformer_engine) >= UNFUSED_PACKED
    if attention == "flash" and found.flash_attention is None:
        raise ConfigError(f"{setting} needs flash-attn, which is not installed. Install it, or use fused.")
    if attention == "unfused" and not unfused_packs:
        raise ConfigError(
            f"{setting} has no packed sequences before Transformer Engine 2.11, and {found.transformer_engine} is "
            "installed. Use fused, or flash."
        )
    if policy.precision == "fp32" and (attention in ("flash", "fused") or not unfused_packs):
        raise ConfigError(
            f"policy.precision=fp32 with {setting}: on a GPU only Transformer Engine's unfused attention, of 2.11 or "
            "newer, computes packed sequences in fp32. Use policy.precision=bf16, or attention=unfused."
        )
    if policy.context_parallel > 1 and (attention == "unfused" or policy.precision == "fp32"):
        raise ConfigError(
            f"policy.context_parallel={policy.context_parallel} with policy.precision={policy.precision} and {setting}: "
            "Transformer Engine's unfused attention, which that is, does not split sequences. Use bf16 with fused or flash."
        )


def kernel_lines(
    policy: PolicyConfig,
    config: TransformerConfig,
    optimizer: MegatronOptimizer,
    installed: Installed | None = None,
) -> list[str]:
    """What computes in this run, a line for each part; config and optimizer as they were built."""
    found = installed or Installed.here()
    engine = found.transformer_engine
    if engine is not None:
        layers = f"Transformer Engine {engine} with fused norms"
        attention = f"{config.attention_backend.name}, by Transformer Engine; {found.flash_attention or 'no flash-attn'}"
    else:
        layers = "megatron-core's local ones; Transformer Engine is not in use"
        attention = "torch's, one padded row a sequence"
    logits = torch.empty(0, dtype=config.params_dtype, device="cuda" if found.capability else "cpu")
    precision = policy.precision
    if config.fp8:
        weights = "FP8" if config.fp8_param else "bf16"
        precision += (
            f" (megatron-core's {Fp8Recipe(config.fp8_recipe).value}, {config.fp8}; weights in {weights})"
        )
    lines = {
        "precision": precision,
        "layers": layers,
        "attention": attention,
        "RoPE": "Transformer Engine's, fused" if config.apply_rope_fusion else "megatron-core's, not fused",
        "gradient fusion": "apex's" if config.gradient_accumulation_fusion else "none",
        "experts": experts_line(config, engine),
        "optimizer": adam_line(optimizer),
        "token statistics": kernel_for(logits).__name__.rpartition(".")[2].replace("_", " "),
    }
    return [f"{name:<17} {text}" for name, text in lines.items()]


def experts_line(config: TransformerConfig, transformer_engine: str | None) -> str:
    """Which product the experts of a layer share."""
    if not config.num_moe_experts:
        return "none"
    if not config.moe_grouped_gemm:
        return "one product an expert"
    return "grouped GEMM, " + ("Transformer Engine's" if transformer_engine else "megatron-core's")


def adam_line(optimizer: MegatronOptimizer) -> str:
    """The class that steps, as it was built: megatron-core takes Transformer Engine's, apex's or torch's by import."""
    inner: Any = optimizer
    while not isinstance(inner, torch.optim.Optimizer):
        chained = getattr(inner, "chained_optimizers", None)
        inner = chained[0] if chained else inner.optimizer
    return f"{type(inner).__name__} of {type(inner).__module__.partition('.')[0]}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
