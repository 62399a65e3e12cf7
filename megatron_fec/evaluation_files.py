"""What an evaluation leaves in its folder: every generation, what they were made with, and the results.

generations/NAME.jsonl holds one line a response, in the order of problems and samples, so that what is there tells
where to go on. Written by rank 0.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_fec.config import ConfigError
from megatron_fec.engines import weight_files
from megatron_fec.tasks.verifier import Verdict
from megatron_fec.types import Prompt, SampleGroup

MADE_WITH = "made_with.json"
DIGEST_BLOCKS, DIGEST_BYTES = 64, 1 << 14  # of each file of weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One line."""

    prompt_id: int
    sample: int  # its number among the responses to the prompt
    text: str  # of the prompt
    answer: str
    response: str
    tokens: int  # of the response, its end included
    reward: float
    verdict: str  # scored, or why the reward is 0: timeout, crash
    truncated: bool
    finish: str  # stop | length
    seed: int


_TYPES = {
    item.name: {"int": int, "str": str, "float": float, "bool": bool}[str(item.type)]
    for item in fields(Generation)
}


def generations_path(folder: Path, benchmark: str) -> Path:
    return folder / "generations" / f"{benchmark}.jsonl"


def generations_of(
    groups: Sequence[SampleGroup], verdicts: Sequence[Sequence[Verdict]], seeds: Sequence[int]
) -> list[Generation]:
    """The lines of one batch; seeds: of the first sample of each group, the next has the next number."""
    return [
        Generation(
            prompt_id=group.prompt.prompt_id,
            sample=number,
            text=group.prompt.text,
            answer=group.prompt.answer,
            response=sample.text,
            tokens=len(sample.token_ids),
            reward=verdict.reward,
            verdict="timeout" if verdict.is_timeout else "crash" if verdict.is_crash else "scored",
            truncated=sample.is_truncated,
            finish="length" if sample.is_truncated else "stop",
            seed=seed + number,
        )
        for group, group_verdicts, seed in zip(groups, verdicts, seeds, strict=True)
        for number, (sample, verdict) in enumerate(zip(group.samples, group_verdicts, strict=True))
    ]


def append_generations(path: Path, generations: Sequence[Generation]) -> None:
    """On disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(generation)) + "\n" for generation in generations)
        file.flush()
        os.fsync(file.fileno())


def read_generations(
    path: Path, prompts: Sequence[Prompt], *, samples: int, seeds: Sequence[int]
) -> list[Generation]:
    """The lines of a file, which must be the first ones of this evaluation; [] where there is no file.

    A last line without its newline was cut off by a kill and is left out; any other broken line is an error.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
        generation, fault = _parsed(line)
        if generation is not None:
            place = (number // samples, number % samples)
            if place[0] >= len(prompts):
                fault = f"the {len(prompts)} problems have {len(prompts) * samples} responses"
            elif (generation.prompt_id, generation.sample) != place:
                fault = (
                    f"it is of prompt_id {generation.prompt_id}, sample {generation.sample}, not of {place}"
                )
            elif generation.seed != seeds[place[0]] + place[1]:
                fault = f"its seed is {generation.seed}, not {seeds[place[0]] + place[1]}"
        if generation is None or fault:
            raise ConfigError(
                f"{path} line {number + 1} is not a generation of this evaluation: {fault}. Cut the file before that "
                "line to sample anew from there, or remove the file."
            )
        found.append(generation)
    return found


def keep_generations(path: Path, count: int) -> None:
    """Cuts the file behind its first `count` lines."""
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:count]
        os.truncate(path, sum(len(line) + 1 for line in lines))


def check_made_with(folder: Path, made_with: Mapping[str, Any]) -> None:
    """Notes what a folder's generations are made with; refuses a folder that holds others.

    made_with: {"model", "rollout", "benchmarks": {name: ...}, ...}. Benchmarks may come one after another; those that
    the folder has already stay noted.
    """
    path, mine = folder / MADE_WITH, _flat(made_with)
    noted: dict[str, Any] = {"benchmarks": {}}
    if path.exists():
        try:
            noted = json.loads(path.read_text())
            known, names = _flat(noted), tuple(noted["benchmarks"])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is not readable ({error!r}). Use another output_dir, or move that folder away."
            ) from error
        new = tuple(f"benchmarks.{name}." for name in made_with["benchmarks"] if name not in names)
        for key, value in mine.items():
            is_free = key == "model.path" or key.startswith(new)  # the same weights may lie elsewhere
            if not is_free and (key not in known or known[key] != value):
                raise ConfigError(_other(folder, key, known, mine))
    elif (folder / "generations").exists():
        raise ConfigError(
            f"output_dir={folder} holds generations, but no {MADE_WITH}. Use another output_dir."
        )
    merged = {**made_with, "benchmarks": {**noted["benchmarks"], **made_with["benchmarks"]}}
    write_whole(path, json.dumps(merged, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file appears as a whole or not at all."""
    temporary = path.with_name(f".writing_{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def digest_of_weights(model_dir: Path) -> str:
    """Of the sizes and of blocks spread over each file, not of all bytes: these are gigabytes, and training moves all."""
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in weight_files(model_dir):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for block in range(DIGEST_BLOCKS):
                file.seek(max(0, size - DIGEST_BYTES) * block // (DIGEST_BLOCKS - 1))
                digest.update(file.read(DIGEST_BYTES))
    return digest.hexdigest()[:16]


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """Of all that the engine and the verifier see."""
    rows = [(prompt.token_ids, prompt.answer, prompt.verifier, prompt.extra) for prompt in prompts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _parsed(line: bytes) -> tuple[Generation | None, str]:
    """A generation, or what is wrong with the line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return None, f"{error}"
    if not isinstance(row, dict) or row.keys() != _TYPES.keys():
        return None, f"it must be an object with the keys {', '.join(_TYPES)}"
    for name, kind in _TYPES.items():
        if type(row[name]) is not kind:
            return None, f"{name} must be {kind.__name__}, not {row[name]!r}"
    return Generation(**row), ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _other(folder: Path, key: str, known: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """The error of a folder that was made otherwise."""
    if key == "model.digest":
        what = f"of other weights (model.path={known['model.path']}) than model.path={mine['model.path']}"
    elif key.endswith((".prompts", ".problems")):
        name = key.rsplit(".", 1)[0]
        what = f"of other prompts than {name} has now: its data, columns or style changed, or the tokenizer"
    else:
        what = f"made with {key}={known.get(key)}, not {mine[key]}"
    return (
        f"output_dir={folder} holds an evaluation {what}. Use another output_dir, or move that folder away."
    )
