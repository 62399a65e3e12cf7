r"""Rewards: pure functions of text, (response, answer, extra) -> reward between 0 and 1.

Responses are untrusted and can be of any length: what is done here to all of one takes time linear in it, and of one
beyond LONGEST only the last \boxed{...} or the end goes to the libraries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache, lru_cache

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from reasoning_gym import create_dataset

from megatron_fec.tasks.arithmetic import core_expression

LONGEST = 1 << 17  # characters that a library reads: more than 32768 tokens of prose
CACHE_SIZE = 8192  # verdicts that a worker keeps; the embedded task repeats itself
CACHED = 1000  # characters; a longer answer does not come again
BOX = "\\boxed{"
BRACE = re.compile(r"\\boxed\{|\\[{}]|[{}]")
COUNTDOWN = re.compile(r"[1-9]([-+*][1-9])*")


def score_math(response: str, answer: str, extra: str) -> float:
    """1 if the last box of the response, or else what math-verify extracts from its end, equals the answer."""
    box = last_box(response)
    if box is None:
        return float(_equal_latex.__wrapped__(response[-LONGEST:], answer))
    if len(box) > LONGEST:
        return 0.0
    is_equal = _equal_latex if len(box) <= CACHED else _equal_latex.__wrapped__
    return float(is_equal(f"{BOX}{box}}}", answer))


def score_countdown(response: str, answer: str, extra: str) -> float:
    """1 if the response, without fillers, uses each of extra's numbers once and has the answer's value."""
    expression = core_expression(response)
    if COUNTDOWN.fullmatch(expression) is None:
        return 0.0
    if sorted(map(int, expression[::2])) != sorted(json.loads(extra)["numbers"]):
        return 0.0
    return float(_equal_arithmetic(expression, answer))


def score_reasoning_gym(response: str, answer: str, extra: str) -> float:
    """What reasoning-gym's own scorer gives the last box, or else the whole response; between 0 and 1."""
    task = json.loads(extra, object_hook=_restore)
    assert isinstance(task, dict)
    box = last_box(response)
    candidate = response.strip() if box is None else box
    if len(candidate) > LONGEST:
        return 0.0
    return float(_reasoning_gym_scorer(task["dataset"])(candidate, task["entry"]))


SCORERS: dict[str, Callable[[str, str, str], float]] = {
    "math": score_math,
    "countdown": score_countdown,
    "reasoning_gym": score_reasoning_gym,
}


def last_box(text: str) -> str | None:
    r"""What the last complete \boxed{...} holds, None where there is none; one pass, whatever the text."""
    opened: list[tuple[int, bool]] = []  # of each brace that is open: where its content starts, is it a box
    last = (-1, -1)
    for match in BRACE.finditer(text):
        token = match[0]
        if token == "}" and opened:
            start, is_box = opened.pop()
            if is_box and start > last[0]:
                last = (start, match.start())
        elif token == "{" or token == BOX:  # an escaped brace is a character
            opened.append((match.end(), token == BOX))
    return text[last[0] : last[1]] if last[0] >= 0 else None


def to_json(value: object) -> str:
    """JSON in which tuples and number keys survive: reasoning-gym's scorers tell (1, 2) from [1, 2]."""
    return json.dumps(_tagged(value), default=str)


def _tagged(value: object) -> object:
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _tagged(item) for key, item in value.items()}
        return {"__pairs__": [[_tagged(key), _tagged(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [_tagged(item) for item in value]}
    return [_tagged(item) for item in value] if isinstance(value, list) else value


def _restore(value: dict) -> object:
    if "__tuple__" in value:
        return tuple(value["__tuple__"])
    return dict(value["__pairs__"]) if "__pairs__" in value else value


# math-verify's own timeouts are off (0): C code does not notice their SIGALRM. The worker's deadline holds.
@lru_cache(maxsize=CACHE_SIZE)
def _equal_latex(text: str, answer: str) -> bool:
    return verify(_gold(answer), parse(text, parsing_timeout=0), timeout_seconds=0)


@lru_cache(maxsize=CACHE_SIZE)
def _equal_arithmetic(expression: str, answer: str) -> bool:
    value = parse(expression, [ExprExtractionConfig()], parsing_timeout=0)
    return verify(_gold(answer), value, timeout_seconds=0)


@lru_cache(maxsize=CACHE_SIZE)
def _gold(answer: str) -> list:
    gold = parse(f"{BOX}{answer}}}", [LatexExtractionConfig()], parsing_timeout=0)
    if not gold:
        raise ValueError(f"the answer {answer!r} is not LaTeX that math-verify can read")
    return gold


@cache
def _reasoning_gym_scorer(name: str) -> Callable[[str, dict], float]:
    return create_dataset(name).score_answer
