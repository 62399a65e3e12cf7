"""Runs the units that have no record yet, several at a time; what is finished survives an interruption."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megatron_fec.study.experiments import EXPERIMENTS
from megatron_fec.study.units import (
    Record,
    Unit,
    made_with,
    read_record,
    run_unit,
    warm_start_of,
)
from megatron_fec.study.variants import SHORT


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much of the experiments is run."""

    name: str
    seeds: int
    bandit_steps: int
    embedded_steps: int
    short_steps: int  # of the variants in SHORT
    warm_steps: int
    embedded: frozenset[str] | None  # variants; None is all


FULL = Scale(
    name="full",
    seeds=3,
    bandit_steps=400,
    embedded_steps=64,
    short_steps=32,
    warm_steps=500,
    embedded=None,
)
QUICK = Scale(
    name="quick",
    seeds=2,
    bandit_steps=400,
    embedded_steps=32,
    short_steps=16,
    warm_steps=300,
    embedded=frozenset({"grpo", "dynamic_upper", "id", "target"}),
)


def plan(names: Sequence[str], scale: Scale, num_seeds: int) -> list[Unit]:
    """The units that the experiments need, each once: what others start from first, then the shortest."""
    wanted: dict[Unit, None] = {}
    for bed in ("exact", "tabular", "random", "embedded"):
        for variant in dict.fromkeys(v for name in names for v in EXPERIMENTS[name].runs.get(bed, ())):
            if bed != "embedded" or scale.embedded is None or variant in scale.embedded:
                for seed in range(num_seeds):
                    wanted[_unit(bed, variant, seed, scale)] = None
    warm = dict.fromkeys(warm_start_of(unit) for unit in wanted if unit.bed == "embedded")
    return [*warm, *wanted]


def _unit(bed: str, variant: str, seed: int, scale: Scale) -> Unit:
    if bed == "embedded":
        steps = scale.short_steps if variant in SHORT else scale.embedded_steps
        return Unit(bed=bed, variant=variant, seed=seed, steps=steps, warm_steps=scale.warm_steps)
    return Unit(bed=bed, variant=variant, seed=seed, steps=1 if bed == "exact" else scale.bandit_steps)


def run_units(
    units: Sequence[Unit], work: Path, *, jobs: int, say: Callable[[str], None]
) -> tuple[dict[Unit, Record], dict[Unit, str]]:
    """(records of the units that are done, what went wrong with the others); one failure does not stop the rest.

    A unit whose record was made with other settings runs again.
    """
    records, open_units = {}, []
    for unit in units:
        expected = made_with(unit)  # first of all, so that a wrong setting stops before anything runs
        record = read_record(work / unit.name / "record.json")
        if record is not None and record.made_with == expected:
            records[unit] = record
        else:
            open_units.append(unit)
    say(f"{len(records)} of {len(units)} units are done already" if records else f"{len(units)} units")
    failures: dict[Unit, str] = {}
    start = time.perf_counter()
    # The second half starts from what the first half leaves.
    for phase in (
        [u for u in open_units if u.bed != "embedded"],
        [u for u in open_units if u.bed == "embedded"],
    ):
        runnable = []
        for unit in phase:
            if unit.bed == "embedded" and warm_start_of(unit) in failures:
                failures[unit] = f"{unit.name}: its warm start failed."
            else:
                runnable.append(unit)
        for unit, result in _in_parallel(runnable, work, jobs):
            if isinstance(result, Record):
                records[unit] = result
                took = f"{result.seconds:.0f} s"
            else:
                failures[unit] = took = str(result)
            minutes = (time.perf_counter() - start) / 60
            say(f"{len(records) + len(failures):4d}/{len(units)}  {minutes:5.1f} min  {unit.name}  {took}")
    return records, failures


def seconds_of(records: Mapping[Unit, Record]) -> float:
    """Of all units together, each on one core."""
    return sum(record.seconds for record in records.values())


def _in_parallel(units: Sequence[Unit], work: Path, jobs: int) -> Iterator[tuple[Unit, Record | Exception]]:
    if not units:
        return
    pool = ProcessPoolExecutor(
        max_workers=min(jobs, len(units)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        futures: dict[Future[Record], Unit] = {pool.submit(run_unit, unit, work): unit for unit in units}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool) or not isinstance(error, (Exception, type(None))):
                raise RuntimeError("a process of the study was killed; start it again to go on.") from error
            yield futures[future], error if error is not None else future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A study that is killed leaves no training behind that would write into the folders of the next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)
