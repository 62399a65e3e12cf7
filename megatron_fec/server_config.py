"""The rules of rollout.engine=servers and rollout.max_lag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_fec.errors import ConfigError
from megatron_fec.policy_options import options_of_policy

if TYPE_CHECKING:
    from megatron_fec.config import AlgorithmConfig, PolicyConfig, RolloutConfig


def check_servers(rollout: RolloutConfig, policy: PolicyConfig) -> None:
    """Raises ConfigError naming setting, value, rule and remedy of the first broken rule."""
    check_rollout_precision(rollout)
    if rollout.max_lag not in (0, 1):
        raise ConfigError(f"rollout.max_lag={rollout.max_lag} must be 0 or 1.")
    if rollout.max_lag and rollout.engine != "servers":
        raise ConfigError(
            f"rollout.max_lag=1 needs rollout.engine=servers, not {rollout.engine}: that engine samples where the policy "
            "trains. Start servers (docs/rollout_servers.md), or set rollout.max_lag=0."
        )
    if rollout.engine == "servers" and not rollout.seed_per_request:
        raise ConfigError(
            "rollout.seed_per_request=false does not go with rollout.engine=servers: a prompt that is sent again must get "
            "the same samples. Set it to true."
        )
    offload = options_of_policy(policy).offload
    if rollout.engine == "servers" and offload != "none":
        raise ConfigError(
            f"policy.options.offload={offload} does not go with rollout.engine=servers: servers sample on GPUs of their "
            "own, so nobody would use the memory that the policy gives up. Set it to none."
        )


def check_rollout_precision(rollout: RolloutConfig) -> None:
    """Raises ConfigError where the engine cannot quantize; preflight.py asks about the GPU."""
    if rollout.precision == "fp8" and rollout.engine == "native":
        raise ConfigError(
            "rollout.precision=fp8 is vLLM's, and rollout.engine=native samples with the policy itself. Set "
            "rollout.precision=policy, or rollout.engine=vllm."
        )


def correct_staleness(rollout: RolloutConfig, algorithm: AlgorithmConfig) -> None:
    """With rollout.max_lag, importance weights are part of the loss unless it names some itself."""
    if not rollout.max_lag:
        return
    from megatron_fec.algorithm.strategies import ONE_OF  # takes torch, and this module

    if not ONE_OF & set(algorithm.policy_loss.split("+")):
        algorithm.policy_loss += "+truncated_importance"
