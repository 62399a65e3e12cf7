"""`megatron-fec study`: from the names of experiments to the page about them."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_fec.algorithm.options import choose
from megatron_fec.config import ConfigError
from megatron_fec.study.experiments import EXPERIMENTS
from megatron_fec.study.page import About, write_results
from megatron_fec.study.plots import draw
from megatron_fec.study.results import counts, results_of, runs_of
from megatron_fec.study.runner import FULL, QUICK, Scale, plan, run_units, seconds_of
from megatron_fec.study.tabular import Steps
from megatron_fec.study.variants import BEDS, CONSTANT

UNITS = "units"  # in the folder of runs: runs/study/units/full/embedded/id/seed0


def run_study(
    *,
    is_quick: bool,
    seeds: int | None,
    only: Sequence[str],
    jobs: int,
    runs: Path,
    output: Path,
    say: Callable[[str], None],
) -> bool:
    """Runs what has no record in `runs` yet, and writes the results to `output`. False where a unit failed.

    seeds: None is the scale's own number.
    """
    scale = QUICK if is_quick else FULL
    seeds = scale.seeds if seeds is None else seeds
    for name, value in {"--seeds": seeds, "--jobs": jobs}.items():
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1.")
    for name in only:
        choose(EXPERIMENTS, name, key="--only")
    names = [name for name in EXPERIMENTS if not only or name in only]
    start = time.perf_counter()
    units = plan(names, scale, seeds)
    records, failures = run_units(units, runs / UNITS / scale.name, jobs=jobs, say=say)
    curves = runs_of(records)
    results = results_of(names, curves)
    plots = {name: png for name in names if (png := draw(EXPERIMENTS[name], curves)) is not None}
    about = About(
        command=_command(is_quick, seeds, only, jobs),
        scale=scale.name,
        seeds=seeds,
        jobs=jobs,
        constants=_constants(scale),
        unit_seconds=seconds_of(records),
        wall_seconds=time.perf_counter() - start,
        failures=tuple(failures.values()),
    )
    write_results(output, names, results, plots, about)
    say(", ".join(f"{verdict}: {count}" for verdict, count in counts(results).items() if count))
    say(f"study       {output / 'study.html'}")
    return not failures


def _command(is_quick: bool, seeds: int, only: Sequence[str], jobs: int) -> str:
    words = ["megatron-fec", "study", *(["--quick"] if is_quick else [])]
    words += [word for name in only for word in ("--only", name)]
    return shlex.join([*words, "--seeds", str(seeds), "--jobs", str(jobs)])


def _constants(scale: Scale) -> tuple[str, ...]:
    steps = Steps()
    matched = ", ".join(f"{bed.matched} in the {bed.title}" for bed in BEDS.values())
    return (
        "The paper's in all beds: eps_std 0.2, upper line 0.5 - 0.25 p, lower line 0.3 - 0.13 p. "
        f"Clip-Higher and the static ablation: {CONSTANT}. `matched`: {matched}.",
        f"Bandits: T = {scale.bandit_steps}, {steps.prompts_per_step} states x {steps.group_size} answers and "
        f"{steps.updates} updates a step, learning rate {steps.learning_rate}; OD (0.6) has H_min = 0.6 H_init.",
        f"Embedded task: T = {scale.embedded_steps} (one region kept: {scale.short_steps}) after {scale.warm_steps} "
        "supervised steps; all else in configs/study.yaml.",
        "Learning rate and updates a step were chosen so that ratios reach the clip range within a short run, and the tasks "
        "so that rare words exist: this shows a mechanism, and is no benchmark result.",
    )
