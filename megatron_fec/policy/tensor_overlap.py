"""The buffers of policy.options.tp_overlap: Transformer Engine sends parts of a product while it computes the others."""

from __future__ import annotations

from functools import cache
from typing import Any

from megatron.core.utils import is_te_min_version

from megatron_fec.config import PolicyConfig
from megatron_fec.policy_options import FP8, options_of_policy


def initialize_tp_overlap(policy: PolicyConfig, *, hidden_size: int) -> None:
    """Makes Transformer Engine's user buffers, once a process, as megatron-core's own trainer does; nothing if it is off.

    Their size is that of every micro-batch, which PackLayout.is_full_length sees to.
    """
    if options_of_policy(policy).tp_overlap:
        _initialize(buffer_tokens(policy), hidden_size, policy.tensor_parallel, policy.precision in FP8)


def buffer_tokens(policy: PolicyConfig) -> int:
    """Tokens that a context rank holds of a micro-batch, before its split over tensor ranks."""
    return policy.micro_batch_tokens // policy.context_parallel


@cache  # a warm start builds a second policy, and Transformer Engine refuses a second call
def _initialize(tokens: int, hidden_size: int, tensor_parallel: int, is_fp8: bool) -> None:
    from transformer_engine.pytorch import module  # pyright: ignore[reportMissingImports]  # an optional extra

    base: Any = module.base
    if is_te_min_version("2.7.0"):
        modes = base.UserBufferQuantizationMode
        # Both: layers at the start and end may stay in bf16, and the FP8 monitor's passes do.
        precision = {"quantization_modes": [modes.FP8, modes.NONE] if is_fp8 else [modes.NONE]}
    else:
        precision = {"use_fp8": is_fp8}
    base.initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=tensor_parallel,
        ub_cfgs={},
        bootstrap_backend="nccl",
        **precision,
    )
