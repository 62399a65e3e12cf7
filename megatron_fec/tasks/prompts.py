"""Where prompts come from, how they are rendered and checked, and in which order a run sees them.

Rows follow DAPO-Math-17k: `prompt` is a list of {role, content} or a string, `reward_model.ground_truth` the
answer. A row's `extra_info.verifier` names its scorer (without it "math"), which gets `extra_info` as JSON.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS as REASONING_GYM

from megatron_fec.config import ConfigError
from megatron_fec.seeds import derive_seed
from megatron_fec.tasks.arithmetic import countdown_rows
from megatron_fec.tasks.scorers import SCORERS, to_json
from megatron_fec.types import Prompt

BOXED_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
REASONING_GYM_SIZE = 1000
SPLITS = ("train", "validation")
OTHER_DATA_FILES = (".json", ".csv", ".tsv", ".txt", ".gz", ".zip", ".zst", ".arrow", ".pkl", ".yaml")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Messages = list[dict[str, str]]
Row = Mapping[str, Any]  # as read; each value is checked before it is used


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any  # None for a base model

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    prompts: tuple[Prompt, ...]
    num_too_long: int  # left out


class PromptOrder:
    """An endless stream of shuffled epochs, of which a position alone tells what comes next."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        assert num_prompts >= 1
        self._num_prompts = num_prompts
        self._seed = seed

    def batch(self, consumed: int, count: int) -> list[int]:
        """Prompt ids at [consumed, consumed + count) of the stream, counted in prompts; may cross epochs."""
        places = [divmod(position, self._num_prompts) for position in range(consumed, consumed + count)]
        return [int(_permutation(self._num_prompts, self._seed, epoch)[offset]) for epoch, offset in places]


class _SourceError(Exception):
    """Rule and remedy; load_prompts puts setting and value before them."""


def load_prompts(
    source: str,
    *,
    tokenizer: Tokenizer,
    prompt_column: str,
    answer_column: str,
    prompt_style: str,
    max_prompt_tokens: int,
    setting: str = "data.train",
    answer_after: str | None = None,
) -> PromptSet:
    """All prompts of a source, rendered and tokenized, without those that are too long.

    source: a .jsonl or .parquet file, a hub name or folder with [:[CONFIG:]SPLIT] ("train" without it),
    "embedded:countdown", or "reasoning_gym:NAME[:SIZE]"; the last two take a final ":validation" for rows that
    training never sees.
    setting: the name of `source` in error messages; the other settings of its section are named alike.
    answer_after: the answer is what follows the last of these in the answer column, as "####" in GSM8K.
    """
    try:
        rows = _read_rows(source)
        if source.startswith(("embedded:", "reasoning_gym:")):
            prompt_column, answer_column, answer_after = "prompt", "reward_model.ground_truth", None
        tasks = [
            _task(row, f"row {i}", prompt_column, answer_column, answer_after) for i, row in enumerate(rows)
        ]
        if not tasks:
            raise _SourceError("holds no rows. Name a source with at least one prompt.")
        texts = [PROMPT_STYLES[prompt_style](task.messages, tokenizer) for task in tasks]
        # A chat template writes the special tokens itself; for other text the tokenizer adds its own.
        is_templated = prompt_style != "plain" and tokenizer.chat_template is not None
        token_ids = tokenizer(texts, add_special_tokens=not is_templated)["input_ids"]
        fitting = [i for i, ids in enumerate(token_ids) if len(ids) <= max_prompt_tokens]
        if not fitting:
            shortest = min(len(ids) for ids in token_ids)
            raise _SourceError(
                f"has no prompt of at most rollout.max_prompt_tokens={max_prompt_tokens} tokens. "
                f"The shortest of its {len(tasks)} has {shortest}: raise the limit to at least that."
            )
    except _SourceError as error:
        section = setting.rpartition(".")[0]
        remedy = re.sub(r"\bdata(?=\.(prompt|answer)_)", section, str(error))
        raise ConfigError(f"{setting}={source} {remedy}") from error
    prompts = tuple(
        Prompt(
            prompt_id=prompt_id,
            text=texts[i],
            token_ids=tuple(token_ids[i]),
            answer=tasks[i].answer,
            verifier=tasks[i].verifier,
            extra=tasks[i].extra,
        )
        for prompt_id, i in enumerate(fitting)
    )
    return PromptSet(prompts=prompts, num_too_long=len(tasks) - len(fitting))


# ------------------------------------------------------------------ rendering


def _boxed(messages: Messages, tokenizer: Tokenizer) -> str:
    """The last user message with the instruction after it; then the chat template, if the tokenizer has one.

    Without a template the text is that one message; a system message is then left out.
    """
    last = _last_user(messages)
    asked = {**messages[last], "content": messages[last]["content"] + BOXED_INSTRUCTION}
    if tokenizer.chat_template is None:
        return asked["content"]
    return _templated([*messages[:last], asked, *messages[last + 1 :]], tokenizer)


def _chat(messages: Messages, tokenizer: Tokenizer) -> str:
    """The messages through the chat template, as they are."""
    if tokenizer.chat_template is None:
        raise _SourceError(
            "with data.prompt_style=chat needs a tokenizer's chat template. Use boxed or plain."
        )
    return _templated(messages, tokenizer)


def _plain(messages: Messages, tokenizer: Tokenizer) -> str:
    """The last user message, verbatim."""
    return messages[_last_user(messages)]["content"]


PROMPT_STYLES: dict[str, Callable[[Messages, Tokenizer], str]] = {
    "boxed": _boxed,
    "chat": _chat,
    "plain": _plain,
}


def _templated(messages: Messages, tokenizer: Tokenizer) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _last_user(messages: Messages) -> int:
    return max(i for i, message in enumerate(messages) if message["role"] == "user")


# ------------------------------------------------------------------ one row


@dataclass(frozen=True, slots=True)
class _Task:
    messages: Messages
    answer: str
    verifier: str
    extra: str


def _task(row: Row, place: str, prompt_column: str, answer_column: str, answer_after: str | None) -> _Task:
    """A checked row; place names it in errors."""
    prompt = _column(row, prompt_column, "data.prompt_column", place)
    answer = _column(row, answer_column, "data.answer_column", place)
    extra = row["extra_info"] if isinstance(row, Mapping) and "extra_info" in row else None
    verifier = "math"
    if isinstance(extra, Mapping) and "verifier" in extra and extra["verifier"] is not None:
        verifier = str(extra["verifier"])
    if verifier not in SCORERS:
        near = difflib.get_close_matches(verifier, SCORERS, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(SCORERS)}."
        raise _SourceError(f"has an unknown extra_info.verifier {verifier!r} in {place}. {remedy}")
    return _Task(
        messages=_messages(prompt, prompt_column, place),
        answer=_answer(answer, answer_column, place, answer_after),
        verifier=verifier,
        extra="" if verifier == "math" else to_json(extra),
    )


def _column(row: Row, column: str, setting: str, place: str) -> Any:
    """The value at a dotted path."""
    value: Any = row
    for depth, key in enumerate(parts := column.split(".")):
        if not isinstance(value, Mapping) or key not in value:
            within = ".".join(parts[:depth])
            names = ", ".join(map(str, value)) if isinstance(value, Mapping) else "none"
            there = f"{within} has" if within else "there are"
            raise _SourceError(
                f"has no column {column} in {place}; {there} {names}. Set {setting} to one of them."
            )
        value = value[key]
    return value


def _messages(prompt: Any, column: str, place: str) -> Messages:
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    messages = prompt if isinstance(prompt, list) else []
    is_valid = all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not is_valid or not any(m["role"] == "user" for m in messages):
        raise _SourceError(
            f"has in {place} a {column} that is neither text nor a list of {{role, content}} with a user "
            f"message: {_shown(prompt)}. Mend the row or set data.prompt_column to another column."
        )
    return [dict(m) for m in messages]


def _answer(answer: object, column: str, place: str, after: str | None) -> str:
    """A text or number as text; a list of one entry is that entry, as in OlympiadBench."""
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    if after and isinstance(answer, str):
        _, found, rest = answer.rpartition(after)
        if not found or not rest.strip():
            raise _SourceError(
                f"has in {place} a {column} with nothing after {after!r}: {_shown(answer)}. "
                "Set data.answer_after to what stands before the answer, or to null."
            )
        return rest.strip()
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if is_number or (isinstance(answer, str) and answer.strip()):
        return str(answer)
    raise _SourceError(
        f"has in {place} a {column} that is neither text nor a number: {_shown(answer)}. "
        "Mend the row or set data.answer_column to another column."
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------ sources


def _read_rows(source: str) -> Iterable[Row]:
    path = Path(source)
    if source.startswith("embedded:"):
        return _read_embedded(source.split(":")[1:])
    if source.startswith("reasoning_gym:"):
        return _read_reasoning_gym(source.split(":")[1:])
    if path.suffix in (".jsonl", ".parquet") or path.suffix in OTHER_DATA_FILES or path.is_file():
        return _read_file(path)
    name, *parts = source.split(":")
    if not (Path(name).is_dir() or HUB_NAME.fullmatch(name)) or len(parts) > 2 or not all(parts):
        raise _SourceError(
            "does not exist. Use a .jsonl or .parquet file, a hub name, or embedded:countdown; a split of a hub name "
            "is NAME:SPLIT, or NAME:CONFIG:SPLIT."
        )
    return _read_datasets(name, *parts)


def _read_file(path: Path) -> Iterable[Row]:
    if path.suffix not in (".jsonl", ".parquet"):
        raise _SourceError(
            f"must end in .jsonl or .parquet, not in {path.suffix or 'nothing'}. Convert the file."
        )
    if not path.is_file():
        raise _SourceError(f"does not exist; a relative path starts at {Path.cwd()}. Correct the path.")
    return _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


def _read_jsonl(path: Path) -> list[Row]:
    """Not through `datasets`: it forces one schema on all rows, and its errors do not name the line."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _SourceError(f"is not UTF-8 in line {number}: {error.reason}. Save it as UTF-8.") from error
        except json.JSONDecodeError as error:
            raise _SourceError(f"is broken JSON in line {number}: {error}. Mend or delete it.") from error
        if not isinstance(row, dict):
            raise _SourceError(
                f"must hold a JSON object in line {number}, not {_shown(row)}. Mend or delete it."
            )
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise _SourceError(f"is not a readable parquet file: {error}. Write it again.") from error


def _read_datasets(name: str, *parts: str) -> Iterable[Any]:
    """A hub data set, or a local folder in one of the layouts that `datasets` knows; parts: [config,] split."""
    config, split = (None, *(parts or ("train",)))[-2:]
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it holds a script
        raise _SourceError(
            f"could not be loaded as a file, folder or hub data set: {error}. "
            "Check the name; on a machine that is offline, give a .parquet file fetched elsewhere, or copy "
            "the Hugging Face cache (HF_HOME)."
        ) from error


def _read_embedded(parts: list[str]) -> list[Row]:
    name, split = parts[0], parts[1] if len(parts) == 2 else "train"
    if name != "countdown" or split not in SPLITS or len(parts) > 2:
        raise _SourceError("names no embedded task. Use embedded:countdown or embedded:countdown:validation.")
    return list(countdown_rows(split))


def _read_reasoning_gym(parts: list[str]) -> list[Row]:
    name, *rest = parts
    split = rest.pop() if rest and rest[-1] in SPLITS else "train"
    if name not in REASONING_GYM:
        near = difflib.get_close_matches(name, REASONING_GYM, n=1, cutoff=0.4)
        remedy = f"Did you mean {near[0]}?" if near else f"There are {', '.join(REASONING_GYM)}."
        raise _SourceError(f"names no reasoning-gym data set. {remedy}")
    if len(rest) > 1 or not all(size.isdecimal() and int(size) >= 1 for size in rest):
        raise _SourceError(f"must have the form reasoning_gym:NAME:SIZE; SIZE={REASONING_GYM_SIZE} is usual.")
    size = int(rest[0]) if rest else REASONING_GYM_SIZE
    seed = derive_seed(0, f"reasoning_gym_{split}") % 2**31  # part of the task, the same in every run
    try:
        entries = list(create_dataset(name, size=size, seed=seed))
    except Exception as error:  # a hundred generators, each with its own ways to fail
        raise _SourceError(
            f"cannot be generated with default settings: {error!r}. Use another data set."
        ) from error
    return [_reasoning_gym_row(name, index, entry) for index, entry in enumerate(entries)]


def _reasoning_gym_row(name: str, index: int, entry: dict) -> Row:
    """Some tasks have no single answer (None); their scorer looks at the metadata, so the name stands in."""
    return {
        "prompt": entry["question"],
        "reward_model": {"ground_truth": name if entry["answer"] is None else entry["answer"]},
        "extra_info": {"index": index, "verifier": "reasoning_gym", "dataset": name, "entry": entry},
    }


@lru_cache(maxsize=4)
def _permutation(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, "prompts", epoch)).permutation(num_prompts)
