"""`policy.options`: what a large model on GPUs needs beside its layout, with type, range and the only defaults.

docs/parallelism.md and docs/fp8.md say what each does and what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_fec.algorithm.options import AtLeastOne, NotNegative, Range, Share, check_options
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


def check_policy(policy: PolicyConfig) -> None:
    """Raises ConfigError for an option that does not exist or does not fit its type, and for what excludes each other."""
    check_options({"the policy": PolicyOptions}, policy.options, key="policy.options")
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        raise ConfigError("policy.sequence_parallel=true needs policy.tensor_parallel > 1. Set it to false.")
