"""The strategies that a configuration names: found, checked against their options, and put together.

`algorithm.policy_loss=clip+entropy_bonus` is a key of POLICY_LOSSES and keys of ADDITIONS;
`algorithm.advantage=grpo+overlong` is a key of ADVANTAGES and keys of REWARD_SHAPING. docs/strategies.md lists them and
shows how to add one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from megatron_fec.config import AlgorithmConfig, ConfigError, ScheduleConfig, ThresholdsConfig
from megatron_fec.types import BlendWeights, LossInputs, LossOutput, UpdateTokens

LOSS_KEY, ADVANTAGE_KEY = "algorithm.policy_loss", "algorithm.advantage"
WITHOUT_LINES = ("grpo", "static")  # schedules that leave the clip range as it is
ADAPTIVE = "adaptive_entropy_bonus"  # the addition whose coefficients the trainer computes at every step
ONE_OF = frozenset({"truncated_importance", "masked_importance"})  # both correct the same mismatch
MOVED_ONLY = frozenset({"kl_cov", "region"})
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


def check_strategies(
    algorithm: AlgorithmConfig, *, context_parallel: int, max_response_tokens: int, updates_per_rollout: int
) -> None:
    """Raises ConfigError for a strategy that does not exist, an option that none reads, or a schedule without effect."""
    choose(AGGREGATIONS, algorithm.aggregation, key="algorithm.aggregation")
    check_options(_chosen(algorithm), algorithm.options, key="algorithm.options")
    build_schedule(algorithm.schedule)
    shaped = build_reward_shaping(
        algorithm.advantage, algorithm.options, max_response_tokens=max_response_tokens
    )
    shaped(torch.zeros(1, 2), torch.ones(1, 2))  # a shaping refuses lengths that contradict it
    base, name = algorithm.policy_loss.split("+")[0], algorithm.schedule.name
    if base not in READS_BOUNDS and name not in WITHOUT_LINES:
        raise ConfigError(
            f"algorithm.schedule.name={name} with algorithm.policy_loss={base} does nothing: that loss has no clip "
            f"range. Use algorithm.schedule.name=grpo, or one of {', '.join(sorted(READS_BOUNDS))}."
        )
    if updates_per_rollout == 1 and base in MOVED_ONLY:
        raise ConfigError(
            f"algorithm.policy_loss={base} with one update per rollout does nothing: it acts on tokens whose ratio has "
            "left 1. Lower algorithm.prompts_per_update or raise algorithm.epochs."
        )
    for field in sorted(unread_thresholds(algorithm)):
        value, default = getattr(algorithm.thresholds, field), getattr(ThresholdsConfig(), field)
        if value != default:
            raise ConfigError(
                f"algorithm.thresholds.{field}={value} does nothing with algorithm.schedule.name={name} and "
                f"algorithm.policy_loss={base}. Leave it at {default}, or choose a schedule and a loss that read it."
            )
    if context_parallel > 1 and base in MARKS and marks_of(base, algorithm.options) is None:
        raise ConfigError(
            f"algorithm.options.stat_scope=micro with policy.context_parallel={context_parallel}: a rank sees only a part "
            "of each response. Use algorithm.options.stat_scope=batch."
        )


def drop_unread(before: Any, merged: Any, layer: DictConfig) -> None:
    """Takes from `merged` what it inherits and does not read, where `layer` has chosen other strategies than `before`.

    Settings of a strategy that is no longer chosen go, also where the new one has a setting of that name: its own
    default holds. Schedules keep the settings that both read, such as lower_schedule of id and did. What the layer sets
    itself stays; if nothing reads it, that is a mistake to be told.
    """
    old, new = _algorithm(before), _algorithm(merged)
    own = merged.algorithm
    try:
        left, kept = _chosen(old), _chosen(new)
    except ConfigError:
        return  # check_strategies says which name is wrong
    staying = {name for part in left.keys() & kept.keys() for name in defaults_of(left[part])}
    going = {name for part in left.keys() - kept.keys() for name in defaults_of(left[part])} - staying
    _drop(own.options, going, layer, "algorithm.options")
    names = old.schedule.name, new.schedule.name
    if names[0] not in SCHEDULES or names[1] not in SCHEDULES:
        return
    before_reads, reads = (defaults_of(SCHEDULES[name]).keys() for name in names)
    _drop(own.schedule.options, set(before_reads - reads), layer, "algorithm.schedule.options")
    _reset(own.thresholds, unread_thresholds(new) - unread_thresholds(old), layer, "algorithm.thresholds")


def unread_thresholds(algorithm: AlgorithmConfig) -> set[str]:
    """Fields of ThresholdsConfig that the chosen loss and schedule leave without effect."""
    if algorithm.policy_loss.split("+")[0] not in READS_BOUNDS:
        return {"eps_std", "upper", "lower"}
    weights = STATIC_WEIGHTS.get(algorithm.schedule.name, BlendWeights(upper=1.0, lower=1.0))
    return {name for name in ("upper", "lower") if getattr(weights, name) == 0}


def check_additions(name: str) -> None:
    """Each addition once, and one importance weight at most: a second one would count twice."""
    parts = name.split("+")[1:]
    twice = [part for part in parts if parts.count(part) > 1] + sorted(set(parts) & ONE_OF)[1:]
    if twice:
        raise ConfigError(
            f"{name} adds {twice[0]} to what has its effect already. Name each addition once, and one of "
            f"{', '.join(sorted(ONE_OF))}."
        )


def _algorithm(config: Any) -> AlgorithmConfig:
    """The section of a configuration that may lack values still."""
    values = OmegaConf.to_container(config.algorithm)
    assert isinstance(values, dict)
    values["schedule"] = ScheduleConfig(**values["schedule"])
    return AlgorithmConfig(**{str(name): value for name, value in values.items()})


def _drop(options: Any, names: set[str], layer: DictConfig, key: str) -> None:
    for name in names & set(options):
        if name not in (OmegaConf.select(layer, key) or ()):
            options.pop(name)


def _reset(section: Any, names: set[str], layer: DictConfig, key: str) -> None:
    """Back to the defaults of the section's dataclass."""
    kind = OmegaConf.get_type(section)
    assert kind is not None
    for name in names:
        if name not in (OmegaConf.select(layer, key) or ()):
            section[name] = getattr(kind(), name)


def _chosen(algorithm: AlgorithmConfig) -> dict[str, Callable[..., Any]]:
    """Name -> function of each strategy whose settings are in algorithm.options."""
    loss, *additions = algorithm.policy_loss.split("+")
    advantage, *shaping = algorithm.advantage.split("+")
    check_additions(algorithm.policy_loss)
    check_additions(algorithm.advantage)
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
