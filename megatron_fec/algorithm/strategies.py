"""The strategies that a configuration names: found, checked against their options, and put together.

`algorithm.policy_loss=clip+entropy_bonus` is a key of POLICY_LOSSES and keys of ADDITIONS;
`algorithm.advantage=grpo+overlong` is a key of ADVANTAGES and keys of REWARD_SHAPING. docs/strategies.md lists them and
shows how to add one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from megatron_fec.algorithm.additions import AdaptiveEntropyCoef
from megatron_fec.algorithm.advantages import ADVANTAGES, GroupHistory
from megatron_fec.algorithm.losses import ADDITIONS, AGGREGATIONS, MARKS, POLICY_LOSSES, READS_BOUNDS
from megatron_fec.algorithm.options import check_options, choose, defaults_of, options_of
from megatron_fec.algorithm.reward_shaping import REWARD_SHAPING
from megatron_fec.algorithm.schedules import SCHEDULES, STATIC_WEIGHTS, build_schedule
from megatron_fec.config import AlgorithmConfig, ConfigError, ScheduleConfig
from megatron_fec.types import LossInputs, LossOutput, UpdateTokens

LOSS_KEY, ADVANTAGE_KEY = "algorithm.policy_loss", "algorithm.advantage"
ADAPTIVE = "adaptive_entropy_bonus"  # the addition whose coefficients the trainer computes at every step
REFERENCE = {
    "kl": "kl_coef",
    "archer": "archer_kl_coef",
}  # strategy: the option that makes it need a reference policy


def build_policy_loss(name: str, options: Mapping[str, Any]) -> Callable[[LossInputs], LossOutput]:
    """The loss that `name` spells, with its options; additions weigh or extend the first part."""
    base, *added = name.split("+")
    loss = choose(POLICY_LOSSES, base, key=LOSS_KEY)
    loss_options = options_of(loss, options)
    additions = [(f := choose(ADDITIONS, part, key=LOSS_KEY), options_of(f, options)) for part in added]

    def policy_loss(inputs: LossInputs) -> LossOutput:
        results = [addition(inputs, **settings) for addition, settings in additions]
        for result in results:
            if result.weights is not None:
                weights = result.weights if inputs.weights is None else inputs.weights * result.weights
                inputs = replace(inputs, weights=weights)
        output = loss(inputs, **loss_options)
        unweighted = replace(inputs, weights=None)
        for result in results:
            if result.losses is not None:
                more, _ = AGGREGATIONS[inputs.aggregation](result.losses, unweighted)
                output = replace(output, loss_sum=output.loss_sum + more)
            metrics = output.metrics
            for metric, values in result.metrics.items():
                metrics = metrics.with_pair(metric, _token_sum(values, inputs.response_mask))
            output = replace(output, metrics=metrics)
        return output

    return policy_loss


def marks_of(name: str, options: Mapping[str, Any]) -> Callable[[UpdateTokens], Tensor] | None:
    """What the loss wants computed over a whole update before it, or None."""
    base = name.split("+")[0]
    loss = choose(POLICY_LOSSES, base, key=LOSS_KEY)
    if base not in MARKS or {**defaults_of(loss), **options}["stat_scope"] != "batch":
        return None
    marks, settings = MARKS[base], options_of(MARKS[base], options)
    return lambda tokens: marks(tokens, **settings)


def build_reward_shaping(
    name: str, options: Mapping[str, Any], *, max_response_tokens: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """(rewards [P, G], response lengths [P, G]) -> the rewards that the advantages of `name` see."""
    shapes = [choose(REWARD_SHAPING, part, key=ADVANTAGE_KEY) for part in name.split("+")[1:]]

    def shaped(rewards: Tensor, lengths: Tensor) -> Tensor:
        for shape in shapes:
            rewards = shape(rewards, lengths, max_response_tokens, **options_of(shape, options))
        return rewards

    return shaped


def build_advantage(name: str, options: Mapping[str, Any]) -> Callable[[Tensor, GroupHistory | None], Tensor]:
    """(shaped rewards [P, G], history of the prompts) -> advantages [P, G]."""
    advantage = choose(ADVANTAGES, name.split("+")[0], key=ADVANTAGE_KEY)
    return partial(advantage, **options_of(advantage, options))


def needs_history(name: str) -> bool:
    """Whether the advantage looks at a prompt's earlier rewards: its `history` has no default."""
    advantage = choose(ADVANTAGES, name.split("+")[0], key=ADVANTAGE_KEY)
    return inspect.signature(advantage).parameters["history"].default is inspect.Parameter.empty


def adaptive_entropy(algorithm: AlgorithmConfig) -> AdaptiveEntropyCoef | None:
    """The state of the adaptive entropy bonus where the loss has one."""
    if ADAPTIVE not in algorithm.policy_loss.split("+"):
        return None
    return AdaptiveEntropyCoef(**options_of(AdaptiveEntropyCoef, algorithm.options))


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether the loss compares with a frozen reference policy."""
    for part in algorithm.policy_loss.split("+"):
        if part in REFERENCE:
            function = {**POLICY_LOSSES, **ADDITIONS}[part]
            if {**defaults_of(function), **algorithm.options}[REFERENCE[part]] > 0:
                return True
    return False


def check_strategies(algorithm: AlgorithmConfig, *, context_parallel: int, max_response_tokens: int) -> None:
    """Raises ConfigError for a strategy that does not exist, an option that none reads, or a schedule without effect."""
    choose(AGGREGATIONS, algorithm.aggregation, key="algorithm.aggregation")
    check_options(_chosen(algorithm), algorithm.options, key="algorithm.options")
    build_schedule(algorithm.schedule)
    shaped = build_reward_shaping(
        algorithm.advantage, algorithm.options, max_response_tokens=max_response_tokens
    )
    shaped(torch.zeros(1, 2), torch.ones(1, 2))  # a shaping refuses lengths that contradict it
    base, name = algorithm.policy_loss.split("+")[0], algorithm.schedule.name
    if base not in READS_BOUNDS and name not in STATIC_WEIGHTS:
        raise ConfigError(
            f"algorithm.schedule.name={name} with algorithm.policy_loss={base} does nothing: that loss has no clip "
            f"range. Use algorithm.schedule.name=grpo, or one of {', '.join(sorted(READS_BOUNDS))}."
        )
    if context_parallel > 1 and base in MARKS and marks_of(base, algorithm.options) is None:
        raise ConfigError(
            f"algorithm.options.stat_scope=micro with policy.context_parallel={context_parallel}: a rank sees only a part "
            "of each response. Use algorithm.options.stat_scope=batch."
        )


def drop_unread(merged: Any, layer: DictConfig) -> None:
    """Takes from a merged configuration what its strategies do not read, unless `layer` set it: that is a mistake."""
    algorithm = OmegaConf.to_container(merged.algorithm)
    assert isinstance(algorithm, dict)
    algorithm["schedule"] = ScheduleConfig(**algorithm["schedule"])
    options, schedule = _unread(AlgorithmConfig(**{str(name): value for name, value in algorithm.items()}))
    own = merged.algorithm.schedule
    for name in options:
        if OmegaConf.select(layer, f"algorithm.options.{name}") is None:
            merged.algorithm.options.pop(name)
    for name in schedule:
        if name not in own.options:
            if OmegaConf.select(layer, f"algorithm.schedule.{name}") is None:
                own[name] = getattr(ScheduleConfig, name)
        elif OmegaConf.select(layer, f"algorithm.schedule.options.{name}") is None:
            own.options.pop(name)


def _unread(algorithm: AlgorithmConfig) -> tuple[set[str], set[str]]:
    """Options, and fields or options of the schedule, that the chosen strategies do not read; unknown names read all."""
    try:
        read = {option for function in _chosen(algorithm).values() for option in defaults_of(function)}
    except ConfigError:
        return set(), set()
    if algorithm.schedule.name not in SCHEDULES:
        return set(), set()
    schedule = SCHEDULES[algorithm.schedule.name]
    always = {"name", "total_steps", "options"}
    schedule_fields = {item.name for item in fields(ScheduleConfig)} - always
    unread_options = set(algorithm.schedule.options) - set(defaults_of(schedule))
    return set(algorithm.options) - read, schedule_fields - schedule.READS | unread_options


def _chosen(algorithm: AlgorithmConfig) -> dict[str, Callable[..., Any]]:
    """Name -> function of each strategy whose settings are in algorithm.options."""
    loss, *additions = algorithm.policy_loss.split("+")
    advantage, *shaping = algorithm.advantage.split("+")
    functions = {loss: choose(POLICY_LOSSES, loss, key=LOSS_KEY)}
    if loss in MARKS:
        functions[f"{loss} (its choice of tokens)"] = MARKS[loss]
    functions |= {part: choose(ADDITIONS, part, key=LOSS_KEY) for part in additions}
    if ADAPTIVE in additions:
        functions[ADAPTIVE] = AdaptiveEntropyCoef
    shown = f"{advantage} (advantage)" if advantage in functions else advantage  # dcpo is the name of both
    functions[shown] = choose(ADVANTAGES, advantage, key=ADVANTAGE_KEY)
    return functions | {part: choose(REWARD_SHAPING, part, key=ADVANTAGE_KEY) for part in shaping}


@torch.no_grad()
def _token_sum(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(mask, values.double(), 0.0).sum(), mask.sum()
