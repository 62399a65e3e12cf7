"""Units of work of the study: one variant in one bed with one seed, from its configuration to its record on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fec.config import Config, ConfigError, load_config
from megatron_fec.run_log import Row, read_rows
from megatron_fec.stop import DONE
from megatron_fec.study.exact import FAMILIES, entropy_change, make_states
from megatron_fec.study.quantities import (
    CLIP_LOWER,
    CLIP_UPPER,
    ENTROPY,
    ENTROPY_CHANGE,
    EPS_LOWER,
    EPS_UPPER,
    PASS_AT,
    PREDICTED,
    REWARD,
    WEIGHT_UPPER,
)
from megatron_fec.study.tabular import make_bandit, train_bandit
from megatron_fec.study.variants import BEDS, overrides

PROJECT = Path(__file__).resolve().parents[2]
CONFIG = PROJECT / "configs" / "study.yaml"
RECORD_VERSION = 1
WARM_START = "warm_start"  # the bed and the variant of the unit that the embedded units of a seed start from
KEPT = (  # metrics, or beginnings of their names, that a record holds
    *(ENTROPY, REWARD, EPS_UPPER, EPS_LOWER, CLIP_UPPER, CLIP_LOWER, WEIGHT_UPPER),
    *(PASS_AT, PREDICTED, ENTROPY_CHANGE),
)
LEFT_BEHIND = ("checkpoints", "hf", "model")  # folders of a training run that go once its record is written


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    bed: str  # key of variants.BEDS, or WARM_START
    variant: str
    seed: int
    steps: int  # of the plan, all of which are trained
    warm_steps: int = 0  # supervised steps that the embedded bed starts with

    @property
    def name(self) -> str:
        return f"{self.bed}/{self.variant}/seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a finished unit leaves in record.json."""

    made_with: dict[str, Any]  # unit and configuration; a unit whose own differ runs again
    seconds: float
    rows: list[Row]


def settings(unit: Unit) -> list[str]:
    """The settings of a unit, as key=value."""
    evaluations = max(1, unit.steps // 2) if unit.bed == "embedded" else 0
    return [
        *(overrides(unit.bed, unit.variant) if unit.bed in BEDS else ()),
        f"algorithm.schedule.total_steps={unit.steps}",
        f"trainer.max_steps={unit.steps}",
        f"trainer.eval_every={evaluations}",
        f"trainer.seed={unit.seed}",
        f"warm_start.steps={unit.warm_steps if unit.bed == WARM_START else 0}",
    ]


def configuration(unit: Unit) -> Config:
    """The validated configuration of a unit; the bandits read its section `algorithm` only."""
    return load_config(CONFIG, settings(unit))


def warm_start_of(unit: Unit) -> Unit:
    """The unit whose checkpoint an embedded unit starts from."""
    return Unit(bed=WARM_START, variant=WARM_START, seed=unit.seed, steps=1, warm_steps=unit.warm_steps)


def made_with(unit: Unit) -> dict[str, Any]:
    """All that decides the result of a unit, except the code."""
    config = asdict(configuration(unit))
    kept = config if unit.bed in ("embedded", WARM_START) else {"algorithm": config["algorithm"]}
    return json.loads(json.dumps({"version": RECORD_VERSION, **asdict(unit), "config": kept}))


def read_record(path: Path) -> Record | None:
    """The record of a finished unit, None where there is none yet."""
    if not path.is_file():
        return None
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        if not all(isinstance(row["step"], int) for row in record.rows):
            raise TypeError
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a record of the study (JSON with made_with, seconds and rows). Remove the file: "
            "its unit then runs again."
        ) from error
    return record


def run_unit(unit: Unit, work: Path) -> Record:
    """Does the work of a unit and leaves record.json in its folder; the record appears whole or not at all."""
    folder = work / unit.name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = _RUN[unit.bed](unit, work)
    kept = [{k: v for k, v in row.items() if k == "step" or k.startswith(KEPT)} for row in rows]
    record = Record(made_with=made_with(unit), seconds=round(time.perf_counter() - start, 2), rows=kept)
    temporary = folder / "record.tmp"
    temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
    temporary.replace(folder / "record.json")
    _discard(folder / "run")
    return record


def _exact(unit: Unit, work: Path) -> list[Row]:
    algorithm = configuration(unit).algorithm
    changes = {
        ENTROPY_CHANGE + family: entropy_change(make_states(family, unit.seed), algorithm)
        for family in FAMILIES
    }
    return [{"step": 0, **changes}]


def _bandit(unit: Unit, work: Path) -> list[Row]:
    return train_bandit(
        make_bandit(unit.seed),
        configuration(unit).algorithm,
        num_steps=unit.steps,
        seed=unit.seed,
        is_random_reward=unit.bed == "random",
    )


def _warm_start(unit: Unit, work: Path) -> list[Row]:
    """The supervised steps, whose checkpoint stays in run/warm_start, and one step of reinforcement."""
    run = _train(unit, work)
    if not (run / WARM_START).is_dir():
        raise RuntimeError(f"{unit.name}: no warm-started checkpoint was written under {run}.")
    return []


def _embedded(unit: Unit, work: Path) -> list[Row]:
    run = _train(unit, work, f"model.path={work / warm_start_of(unit).name / 'run' / WARM_START}")
    return read_rows(run / "metrics.jsonl")


def _train(unit: Unit, work: Path, *more: str) -> Path:
    """Runs launch/train.py in a process of its own; returns its run folder. An interrupted run starts over."""
    folder = work / unit.name
    run, log = folder / "run", folder / "log.txt"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, str(PROJECT / "launch" / "train.py"), "--config", str(CONFIG)]
    # The study is about CPU scale, also where there is a GPU.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            [*command, *settings(unit), *more, f"trainer.run_dir={run}"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        ).returncode
    if code != 0:
        raise RuntimeError(f"{unit.name}: training ended with exit code {code}; {log} says why.")
    if not (run / DONE).is_file():
        raise RuntimeError(f"{unit.name}: training was stopped before its end; start the study again.")
    return run


def _discard(run: Path) -> None:
    """Drops what the study does not read again; rows, configuration and a warm-started checkpoint stay."""
    for name in LEFT_BEHIND:
        shutil.rmtree(run / name, ignore_errors=True)


_RUN: dict[str, Callable[[Unit, Path], list[Row]]] = {
    "exact": _exact,
    "tabular": _bandit,
    "random": _bandit,
    "embedded": _embedded,
    WARM_START: _warm_start,
}
