"""The settings of a strategy are the keyword arguments of its function: name, default, type and range in one place.

    def cispo(inputs: LossInputs, *, ratio_max: Positive = 1.28) -> LossOutput: ...

`algorithm.options.ratio_max=2` then reaches it. A setting that no chosen strategy reads is an error, not ignored.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from megatron_fec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The rule of a number, in words and as a test."""

    rule: str
    is_met: Callable[[float], bool]


Positive = Annotated[float, Range(rule="greater than 0", is_met=lambda x: x > 0)]
NotNegative = Annotated[float, Range(rule="0 or more", is_met=lambda x: x >= 0)]
Inside = Annotated[float, Range(rule="between 0 and 1", is_met=lambda x: 0 < x < 1)]
Share = Annotated[float, Range(rule="in [0, 1]", is_met=lambda x: 0 <= x <= 1)]
UpToOne = Annotated[float, Range(rule="in (0, 1]", is_met=lambda x: 0 < x <= 1)]
BelowOne = Annotated[float, Range(rule="in [0, 1)", is_met=lambda x: 0 <= x < 1)]
AboveOne = Annotated[float, Range(rule="greater than 1", is_met=lambda x: x > 1)]
AtLeastOne = Annotated[int, Range(rule="an integer of at least 1", is_met=lambda x: x >= 1)]


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Name -> default of the keyword arguments of a strategy; inspect.Parameter.empty where one is required."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def options_of(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the strategy reads."""
    return {name: options[name] for name in defaults_of(function) if name in options}


def choose(table: Mapping[str, Any], name: str, *, key: str) -> Any:
    """table[name], or a ConfigError that names the nearest."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        remedy = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={name} must be one of {', '.join(table)}.{remedy}")
    return table[name]


def check_options(
    functions: Mapping[str, Callable[..., Any]], options: Mapping[str, Any], *, key: str
) -> None:
    """Each option must be read by one of the strategies, {name: function}, and fit its type; no required one missing."""
    read: dict[str, Callable[..., Any]] = {}
    for name, function in functions.items():
        for option, default in defaults_of(function).items():
            read[option] = function
            if default is inspect.Parameter.empty and option not in options:
                hint = get_type_hints(function, include_extras=True)[option]
                values = "|".join(get_args(hint)) if get_origin(hint) is Literal else "VALUE"
                raise ConfigError(f"{key}.{option} is required by {name}. Set it as {key}.{option}={values}.")
    for option, value in options.items():
        if option not in read:
            raise ConfigError(f"{key}.{option} is not read by {_joined(functions)}. {_remedy(option, read)}")
        fault = _fault(value, get_type_hints(read[option], include_extras=True)[option])
        if fault:
            raise ConfigError(f"{key}.{option}={value} must be {fault}.")


def _joined(functions: Mapping[str, Any]) -> str:
    return " + ".join(functions)


def _remedy(option: str, read: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(option, read, n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"Its settings are {', '.join(read)}." if read else "It has no settings."


def _fault(value: Any, hint: Any) -> str:
    """What the value must be, or "" when it is that. Hints: numbers, bool, str, Literal, lists, X | None, Annotated."""
    if get_origin(hint) is Annotated:
        kind, *rules = get_args(hint)
        ranges = [rule for rule in rules if isinstance(rule, Range)]
        fault = _fault(value, kind)
        if fault:
            return next((rule.rule for rule in ranges), fault)
        return next((rule.rule for rule in ranges if not rule.is_met(value)), "")
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return "" if value in choices else f"one of {', '.join(str(choice) for choice in choices)}"
    if get_origin(hint) in (list, Sequence):
        if not isinstance(value, (list, tuple)):
            return "a list"
        return next(
            (f"a list, each entry {fault}" for v in value if (fault := _fault(v, get_args(hint)[0]))), ""
        )
    if get_origin(hint) is not None:  # X | None
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return "" if value is None else f"{fault}, or null" if (fault := _fault(value, kinds[0])) else ""
    if hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return "" if is_number else "a finite number"
    is_right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    return "" if is_right else {int: "an integer", bool: "true or false", str: "a text"}[hint]
