"""`policy.options`: what a large model on GPUs needs beside its layout, with type, range and the only defaults.

docs/parallelism.md and docs/fp8.md say what each does and what it costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_fec.algorithm.options import AtLeastOne, NotNegative, Range, Share, check_options
from megatron_fec.context_split import sequence_multiple
from megatron_fec.errors import ConfigError

if TYPE_CHECKING:
    from megatron_fec.config import PolicyConfig

FP8 = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8")  # recipes of the layers; weights stay bf16
PRECISIONS = ("bf16", "fp32", *FP8)
Count = Annotated[int, Range(rule="an integer of 0 or more", is_met=lambda x: x >= 0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    # Memory.
    recompute: Literal["none", "selective", "full"] = "none"  # activations that the backward makes anew
    offload: Literal["none", "optimizer", "all"] = "none"  # what host memory keeps while the engine samples
    optimizer_on_host: Share = 0.0  # of the optimizer's state, which then steps on the CPU
    optimizer_precision: Literal["fp32", "bf16_moments", "fp8_moments"] = "fp32"  # of Adam's moments

    # Speed.
    overlap: bool = False  # gradients are reduced and weights gathered while others are computed
    tp_overlap: bool = False  # tensor-parallel collectives overlap with the products beside them
    virtual_stages: AtLeastOne = 1  # model chunks of a pipeline rank; more of them make the bubble smaller
    attention: Literal["auto", "flash", "fused", "unfused"] = "auto"  # auto is Transformer Engine's choice

    # Mixture of experts.
    expert_parallel: AtLeastOne = 1  # ranks that share the experts of a layer
    expert_tensor_parallel: AtLeastOne = 1  # ranks that share one expert
    router: Literal["live", "replay"] = "live"  # replay: updates route each token as the log-prob pass did
    router_load_balance: NotNegative = 0.0  # coefficient of the auxiliary loss; 0 in reinforcement learning

    # FP8, where policy.precision is one of its recipes.
    fp8_params: bool = False  # weights are kept and gathered in FP8
    fp8_bf16_layers_at_start: Count = 0
    fp8_bf16_layers_at_end: Count = 0
    fp8_amax_history: AtLeastOne = 1024  # steps of delayed scaling
    fp8_amax: Literal["max", "most_recent"] = "max"  # which of them scales
    fp8_check_every: Count = 0  # steps between comparisons with bf16; 0 is off
    fp8_flip_limit: Share = 1.0  # largest share of response tokens whose clip decision FP8 may change


def options_of_policy(policy: PolicyConfig) -> PolicyOptions:
    """`policy.options` with its defaults; check_policy has seen them."""
    return PolicyOptions(**policy.options)


def micro_batch_multiple(policy: PolicyConfig) -> int:
    """An update has a multiple of it micro-batches: megatron-core's interleaved schedule runs them in such groups."""
    return policy.pipeline_parallel if options_of_policy(policy).virtual_stages > 1 else 1


def check_policy(policy: PolicyConfig) -> None:
    """Raises ConfigError for an option that does not exist or does not fit its type, and for what excludes each other."""
    check_options({"the policy": PolicyOptions}, policy.options, key="policy.options")
    options = options_of_policy(policy)
    if options.offload == "all" and options.fp8_params:
        raise ConfigError(
            "policy.options.offload=all does not go with policy.options.fp8_params=true: weights in FP8 keep their "
            "scales and transposes outside the buffers that are moved. Use policy.options.offload=optimizer."
        )
    if options.offload == "optimizer" and options.optimizer_on_host == 1.0:
        raise ConfigError(
            "policy.options.offload=optimizer has nothing to move with policy.options.optimizer_on_host=1.0: all of the "
            "optimizer's state is in host memory. Set offload to none, or to all."
        )
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        raise ConfigError("policy.sequence_parallel=true needs policy.tensor_parallel > 1. Set it to false.")
    from megatron_fec.precision_rules import check_precision, token_multiple  # takes this module

    check_precision(policy)
    _check_layout(policy, options_of_policy(policy), token_multiple=token_multiple(policy))


def _check_layout(policy: PolicyConfig, options: PolicyOptions, *, token_multiple: int) -> None:
    """Layout and optimizer options that need others; what the machine or the checkpoint decides is checked later.

    token_multiple: of the tokens of a context rank.
    """
    if options.virtual_stages > 1 and policy.pipeline_parallel == 1:
        raise ConfigError(
            f"policy.options.virtual_stages={options.virtual_stages} needs policy.pipeline_parallel > 1: one stage has no "
            "bubble. Set it to 1."
        )
    if options.tp_overlap and not policy.sequence_parallel:
        raise ConfigError(
            "policy.options.tp_overlap=true needs policy.sequence_parallel=true (and policy.tensor_parallel > 1): it "
            "overlaps the gathers and scatters of sequence parallelism. Set that, or tp_overlap=false."
        )
    context, tokens = policy.context_parallel, policy.micro_batch_tokens
    multiple = math.lcm(context * token_multiple, sequence_multiple(context))
    if options.tp_overlap and tokens % multiple:
        raise ConfigError(
            f"policy.micro_batch_tokens={tokens} must be a multiple of {multiple} with policy.options.tp_overlap=true, "
            f"whose buffers hold a whole micro-batch, split over tensor and context ranks. "
            f"Use {-(-tokens // multiple) * multiple}."
        )
    for name, value in (
        ("optimizer_precision", options.optimizer_precision),
        ("optimizer_on_host", options.optimizer_on_host),
    ):
        if value in ("fp32", 0.0):
            continue
        if not policy.distributed_optimizer:
            raise ConfigError(
                f"policy.options.{name}={value} needs policy.distributed_optimizer=true: megatron-core has it nowhere "
                f"else. Set that, or {name}={'fp32' if isinstance(value, str) else 0}."
            )
        if policy.precision == "fp32":
            raise ConfigError(
                f"policy.options.{name}={value} needs bf16 weights beside fp32 master weights, and policy.precision=fp32 "
                f"has one copy. Use policy.precision=bf16, or {name}={'fp32' if isinstance(value, str) else 0}."
            )
    if options.optimizer_precision != "fp32" and options.optimizer_on_host > 0:
        raise ConfigError(
            f"policy.options.optimizer_precision={options.optimizer_precision} and optimizer_on_host="
            f"{options.optimizer_on_host} exclude each other: the host's Adam keeps fp32 moments. Choose one."
        )
