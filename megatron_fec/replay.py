"""Strategies evaluated on the tokens of a dump, without an engine or a model: what each cuts and does to entropy.

A strategy is written NAME[+ADDITION...][@POINT][,option=value...], as docs/replay.md describes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from yaml import YAMLError

from megatron_fec.algorithm.aggregation import AGGREGATIONS
from megatron_fec.algorithm.entropy_change import (
    derived,
    entropy_change_metrics,
    token_gradients,
)
from megatron_fec.algorithm.losses import ADDITIONS, MARKS, POLICY_LOSSES, READS_BOUNDS
from megatron_fec.algorithm.options import Inside, check_options, choose, defaults_of, options_of
from megatron_fec.algorithm.regions import region_masks
from megatron_fec.algorithm.schedules import STATIC_WEIGHTS
from megatron_fec.algorithm.strategies import build_policy_loss, check_additions, marks_of
from megatron_fec.algorithm.thresholds import ThresholdLines
from megatron_fec.config import ConfigError
from megatron_fec.dump_reader import DumpedUpdate, DumpSettings, UnreadableStepError, dump_folders, read_dump
from megatron_fec.metrics import MetricSums
from megatron_fec.types import BlendWeights, LossInputs

POINTS = ("grpo", "dynamic_upper", "dynamic_lower")  # that a replay without --strategy compares
CLASSES = ("E1", "E2", "E3", "E4", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A policy loss, its options and those of clip_range and aggregated; what is None or missing is as in the dump."""

    label: str
    policy_loss: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: BlendWeights | None = None


@dataclass(slots=True, kw_only=True)
class Result:
    """What one strategy does to all tokens of a dump."""

    strategy: Strategy
    sums: MetricSums | None = None
    updates: list[dict[str, float]] = field(default_factory=list)  # in time order, the headlines of each

    def metrics(self) -> dict[str, float]:
        """Means over all response tokens; a gradient norm is the root of the mean square, so their squares add up."""
        assert self.sums is not None
        means = self.sums.means()
        norms = {
            f"grad_norm/{name}": math.sqrt(means.pop(f"grad_square/{name}")) for name in ("all", *CLASSES)
        }
        return means | derived(means) | norms


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    dump: Path
    settings: DumpSettings  # of its first step
    steps: list[int]
    tokens: int  # rows; a token counts once for each update
    faults: list[str]
    results: list[Result]


def clip_range(
    lines: ThresholdLines,
    *,
    eps_std: Inside | None = None,
    upper: list[float] | None = None,
    lower: list[float] | None = None,
) -> ThresholdLines:
    """The thresholds of the dump with what a --strategy replaces; only losses with a clip range read them."""
    for key, line, limit in (("upper", upper, math.inf), ("lower", lower, 1.0)):
        if line is not None and not (
            len(line) == 2 and all(0 < line[0] * p + line[1] < limit for p in (0, 1))
        ):
            raise ConfigError(
                f"option.{key}={line} must be [slope, intercept], with slope * p + intercept in (0, {limit:g}) "
                "for p from 0 to 1."
            )
    return ThresholdLines(
        eps_std=lines.eps_std if eps_std is None else eps_std,
        upper=lines.upper if upper is None else (upper[0], upper[1]),
        lower=lines.lower if lower is None else (lower[0], lower[1]),
    )


def aggregated(inputs: LossInputs, *, aggregation: str | None = None) -> LossInputs:
    """The inputs with the aggregation that a --strategy names, else the dump's."""
    if aggregation is None:
        return inputs
    choose(AGGREGATIONS, aggregation, key="option.aggregation")
    return replace(inputs, aggregation=aggregation)


def parse_strategy(text: str) -> Strategy:
    """The strategy that a --strategy names; ConfigError for one that does not exist or an option that it does not read."""
    try:
        spelled, *assignments = re.split(r",(?![^\[]*\])", text)
        name, at, point = spelled.partition("@")
        base = name.split("+")[0]
        options = dict(map(_assignment, assignments))
        functions = _functions(name) | {"aggregation": aggregated}
        if base in READS_BOUNDS:
            functions["clip range"] = clip_range
        elif at:
            raise ConfigError(f"{base} has no clip range, so @{point} would do nothing. Leave it out.")
        check_options(functions, options, key="option")
        clip_range(ThresholdLines(), **options_of(clip_range, options))
        choose(AGGREGATIONS, options.get("aggregation", "token_mean"), key="option.aggregation")
        weights = _point(point) if at else None
    except ConfigError as error:
        raise ConfigError(f"--strategy {text}: {error}") from error
    return Strategy(label=text, policy_loss=name, options=options, weights=weights)


def default_strategies(settings: DumpSettings) -> list[Strategy]:
    """The dump's own, then the constant schedules with its loss, or with clip where its loss has no clip range."""
    has_range = settings.policy_loss.split("+")[0] in READS_BOUNDS
    name = settings.policy_loss if has_range else "clip"
    trained = Strategy(label=f"as trained: {settings.policy_loss}@{settings.schedule}")
    return [trained, *(parse_strategy(f"{name}@{point}") for point in POINTS)]


def run_replay(path: Path, texts: Sequence[str], *, skip_corrupt: bool = False) -> Replay:
    """Each strategy on every update of a dump: one step folder, or the folder or run that holds several."""
    strategies = [parse_strategy(text) for text in texts]
    results = [Result(strategy=strategy) for strategy in strategies]
    settings: list[DumpSettings] = []
    faults: list[str] = []
    tokens = 0
    for folder in dump_folders(path):
        try:
            dump = read_dump(folder, skip_corrupt=skip_corrupt)
        except UnreadableStepError as error:
            if not skip_corrupt:
                raise
            faults.append(str(error))
            continue
        if not results:
            results = [Result(strategy=strategy) for strategy in default_strategies(dump.settings)]
        settings.append(dump.settings)
        faults += [f"{folder.name}/{fault}" for fault in dump.faults]
        for update in dump.updates:
            tokens += len(update.logprobs)
            for result in results:
                _add(result, update)
    if not tokens:
        raise ConfigError(f"{path} holds no response token. Dump a step that has some.")
    return Replay(
        dump=path,
        settings=settings[0],
        steps=[one.step for one in settings],
        tokens=tokens,
        faults=faults,
        results=results,
    )


def evaluate(strategy: Strategy, update: DumpedUpdate) -> MetricSums:
    """What the loss reports of this update, and what entropy_change and the gradients say; sums over its tokens."""
    settings = update.settings
    name, options = _loss_of(strategy, settings)
    loss, marks = build_policy_loss(name, options), marks_of(name, options)
    lines = clip_range(settings.lines, **options_of(clip_range, strategy.options))
    bounds = update.bounds(strategy.weights or settings.weights, lines)
    try:
        inputs = update.loss_inputs(bounds, None if marks is None else marks(update.tokens(bounds)))
        inputs = aggregated(inputs, **options_of(aggregated, strategy.options))
        with torch.no_grad():
            output = loss(inputs)
        gradients = token_gradients(loss, inputs)
    except ValueError as error:  # a loss that misses what the run did not compute
        raise ConfigError(
            f"--strategy {strategy.label}: {error} The dump holds what the run's own strategy needed."
        ) from error
    pairs = entropy_change_metrics(gradients, inputs, old_entropy=update.old_entropy)
    pairs |= _gradient_pairs(gradients, inputs, update.sum_p2) | {"loss": (output.loss_sum, output.count)}
    return output.metrics.joined(MetricSums.of(pairs))


def _add(result: Result, update: DumpedUpdate) -> None:
    sums = evaluate(result.strategy, update)
    result.sums = sums if result.sums is None else result.sums + sums
    means = sums.means()
    settings = update.settings
    weights = result.strategy.weights or settings.weights
    place = {
        "step": settings.step,
        "epoch": update.epoch,
        "update": update.update,
        "weight_upper": weights.upper,
        "weight_lower": weights.lower,
    }
    shown = ("cut_positive", "cut_negative", "dH/predicted", "dH/unclipped", "dH/measured", "loss")
    result.updates.append(place | {name: means[name] for name in shown if name in means})


@torch.no_grad()
def _gradient_pairs(
    gradients: Tensor, inputs: LossInputs, sum_p2: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Shares of tokens that keep their gradient or lose it, by the sign of A; token share and squared norm by class.

    The gradient of ln p over the logits has the squared norm 1 - 2p + sum p^2.
    """
    advantages, logprobs = inputs.advantages, inputs.logprobs
    is_cut = gradients == 0
    squares = gradients.double() ** 2 * (1 - 2 * logprobs.double().exp() + sum_p2.double()).clamp(min=0)
    masks = region_masks(logprobs.exp(), (logprobs - inputs.old_logprobs).exp(), advantages)
    masks["none"] = ~torch.stack(list(masks.values())).any(0)
    values = {
        "kept": ~is_cut,
        "cut_positive": is_cut & (advantages > 0),
        "cut_negative": is_cut & (advantages < 0),
        **{f"tokens/{name}": mask for name, mask in masks.items()},
        "grad_square/all": squares,
        **{f"grad_square/{name}": torch.where(mask, squares, 0.0) for name, mask in masks.items()},
    }
    count = torch.tensor(len(logprobs))
    return {name: (value.double().sum(), count) for name, value in values.items()}


def _assignment(text: str) -> tuple[str, Any]:
    """(name, value) of option=value; the value is read as YAML, with 1e-3 a number."""
    name, equals, _ = text.partition("=")
    try:
        parsed = (
            OmegaConf.to_container(OmegaConf.from_dotlist([text])) if equals and name.isidentifier() else {}
        )
    except YAMLError:
        parsed = {}
    if not isinstance(parsed, dict) or name not in parsed:
        raise ConfigError(f"{text!r} must have the form option=value, such as ratio_max=2 or upper=[0,0.28].")
    return name, parsed[name]


def _functions(name: str) -> dict[str, Callable[..., Any]]:
    """The strategies that `name` puts together, by their names."""
    check_additions(name)
    base, *added = name.split("+")
    functions = {base: choose(POLICY_LOSSES, base, key="policy_loss")}
    if base in MARKS:
        functions[f"{base} (its choice of tokens)"] = MARKS[base]
    return functions | {part: choose(ADDITIONS, part, key="addition") for part in added}


def _point(text: str) -> BlendWeights:
    """The weights of a constant schedule, or UPPER/LOWER."""
    numbers = re.fullmatch(r"(-?\d+(?:\.\d*)?)/(-?\d+(?:\.\d*)?)", text)
    if numbers:
        return BlendWeights(upper=float(numbers[1]), lower=float(numbers[2]))
    if text not in STATIC_WEIGHTS:
        raise ConfigError(
            f"@{text} must be one of {', '.join(STATIC_WEIGHTS)}, or two weights such as @0.5/0 (upper/lower)."
        )
    return STATIC_WEIGHTS[text]


def _loss_of(strategy: Strategy, settings: DumpSettings) -> tuple[str, dict[str, Any]]:
    """Name and options of the loss: the run's options that it reads, replaced by those of the strategy."""
    name = strategy.policy_loss or settings.policy_loss
    read = {option for function in _functions(name).values() for option in defaults_of(function)}
    kept = {key: value for key, value in settings.options.items() if key in read}
    return name, kept | strategy.options
