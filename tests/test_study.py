"""The study at its smallest: plan, records, resume after a kill, failures, page, and what a user may get wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_fec import cli
from megatron_fec.config import ConfigError
from megatron_fec.study import command, page, runner, units
from megatron_fec.study.experiments import EXPERIMENTS
from megatron_fec.study.quantities import ENTROPY, PASS_AT
from megatron_fec.study.results import as_json, counts, results_of, runs_of
from megatron_fec.study.runner import FULL, QUICK, plan, run_units
from megatron_fec.study.units import (
    WARM_START,
    Record,
    Unit,
    configuration,
    read_record,
    run_unit,
    warm_start_of,
)
from megatron_fec.study.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
MICRO = replace(QUICK, bandit_steps=4)


def bandit_unit(variant: str, seed: int = 0, steps: int = 3, bed: str = "tabular") -> Unit:
    return Unit(bed=bed, variant=variant, seed=seed, steps=steps)


def rows_of(unit: Unit) -> list[dict]:
    """Made-up curves in the format of a bed."""
    slope = {"grpo": -0.4, "dynamic_lower": -0.6, "dynamic_upper": 0.2}.get(
        unit.variant, -0.1
    ) + unit.seed / 100
    rows = []
    for step in range(unit.steps + 1):
        share = step / unit.steps
        row = {"step": step, ENTROPY: 1 + slope * share, "train_rollouts/reward": 0.3 + share / 5}
        row |= dict.fromkeys(("train_optim/eps_upper_mean", "train_optim/eps_lower_mean"), 0.2 + share / 9)
        row |= {f"train_optim/clip_fraction_{side}": 0.01 for side in ("upper", "lower")}
        row |= {f"exact/entropy_change/{family}": slope for family in ("peaked", "mixed")}
        row |= {f"train_optim/dH/region_E{i}": slope for i in (1, 2, 3, 4)}
        rows.append(row | {"train_optim/weight_upper": 1.0, **{f"{PASS_AT}{k}": 0.5 for k in (1, 8, 32)}})
    return rows


def made_up_records(num_seeds: int) -> dict[Unit, Record]:
    planned = plan(
        list(EXPERIMENTS), replace(FULL, bandit_steps=40, embedded_steps=40, short_steps=20), num_seeds
    )
    return {unit: Record(made_with={}, seconds=1.0, rows=rows_of(unit)) for unit in planned}


def test_all_variants_are_valid_configurations_and_are_used() -> None:
    planned = plan(list(EXPERIMENTS), FULL, 1)
    assert {unit.variant for unit in planned} == {*VARIANTS, WARM_START}
    for unit in planned:
        config = configuration(unit)
        assert config.algorithm.schedule.total_steps == config.trainer.max_steps == unit.steps
    embedded = configuration(Unit(bed="embedded", variant="static_id", seed=7, steps=64))
    assert embedded.algorithm.thresholds.upper == [0, 0.28] and embedded.trainer.seed == 7
    assert (embedded.trainer.eval_every, embedded.warm_start.steps) == (32, 0)
    bandit = configuration(bandit_unit("id_0.3", steps=400))
    assert bandit.algorithm.thresholds.lower == [-0.13, 0.3]  # the paper's, not the quickstart's
    assert (
        bandit.algorithm.thresholds.upper == [-0.25, 0.5]
        and bandit.algorithm.schedule.options["phase_ratio"] == 0.3
    )


def test_the_plan_has_each_unit_once_and_warm_starts_first() -> None:
    planned = plan(list(EXPERIMENTS), FULL, 2)
    assert len(planned) == len(set(planned))
    assert [unit.bed for unit in planned[:2]] == [WARM_START] * 2
    beds = [unit.bed for unit in planned]
    assert beds == sorted(beds, key=[WARM_START, "exact", "tabular", "random", "embedded"].index)
    assert {warm_start_of(unit) for unit in planned if unit.bed == "embedded"} == set(planned[:2])
    quick = plan(list(EXPERIMENTS), QUICK, 1)
    assert {unit.variant for unit in quick if unit.bed == "embedded"} == QUICK.embedded
    assert all(unit.bed in ("tabular", "random") for unit in plan(["phase_ratio"], FULL, 1))


def test_a_record_comes_back_and_settings_that_changed_are_seen(tmp_path: Path) -> None:
    unit = bandit_unit("id")
    record = run_unit(unit, tmp_path)
    path = tmp_path / "tabular/id/seed0/record.json"
    assert read_record(path) == record and len(record.rows) == 4
    assert {"train_rollouts/entropy", "train_optim/eps_upper_mean", "val_rollouts/pass_at_k/32"} <= set(
        record.rows[0]
    )
    assert record.made_with == units.made_with(unit)
    assert units.made_with(replace(unit, steps=4)) != record.made_with
    assert read_record(tmp_path / "none.json") is None
    said: list[str] = []
    stamp = path.stat().st_mtime_ns
    records, _ = run_units([unit], tmp_path, jobs=1, say=said.append)
    assert records == {unit: record} and said == ["1 of 1 units are done already"]
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rows": []}', '{"made_with": {}, "seconds": 1, "rows": [{}]}']
)
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tabular/id/seed0/record.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"seed0/record.json is not a record of the study .* Remove the file"
    ):
        run_units([bandit_unit("id")], tmp_path, jobs=1, say=print)


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_fec.study.runner import run_units
from megatron_fec.study.units import Unit

def die(text):
    print(text, flush=True)
    if "1/3 " in text:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    units = [Unit(bed="tabular", variant=v, seed=0, steps=30) for v in ("grpo", "id", "did")]
    run_units(units, Path(sys.argv[1]), jobs=1, say=die)
"""


@pytest.mark.slow
def test_a_killed_study_goes_on_with_the_same_result(tmp_path: Path) -> None:
    script, work = tmp_path / "study.py", tmp_path / "units"
    script.write_text(KILLED)
    # Its worker process holds the pipe too, so this ends only when that has ended with its parent.
    killed = subprocess.run(
        [sys.executable, str(script), str(work)], capture_output=True, text=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL and " tabular/grpo/seed0 " in killed.stdout
    done = {path: path.stat().st_mtime_ns for path in work.rglob("record.json")}
    assert 1 <= len(done) < 3
    wanted = [bandit_unit(variant, steps=30) for variant in ("grpo", "id", "did")]
    records, failures = run_units(wanted, work, jobs=1, say=print)
    assert not failures and set(records) == set(wanted)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    for unit in (wanted[0], wanted[-1]):  # one from before the kill, one from after it
        assert run_unit(unit, tmp_path / "alone").rows == records[unit].rows


def test_a_unit_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    broken = tmp_path / "tabular/id/seed0"
    broken.parent.mkdir(parents=True)
    broken.write_text("a file where the folder of a unit should be")
    good, bad = bandit_unit("grpo"), bandit_unit("id")
    records, failures = run_units([bad, good], tmp_path, jobs=1, say=print)
    assert set(records) == {good} and set(failures) == {bad} and "seed0" in failures[bad]


def test_a_failed_warm_start_spares_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Unit(bed="embedded", variant="id", seed=0, steps=4, warm_steps=2)
    warm = warm_start_of(unit)
    tried: list[Unit] = []

    def fail(units: list[Unit], work: Path, jobs: int) -> list[tuple[Unit, Exception]]:
        tried.extend(units)
        return [(unit, RuntimeError("no")) for unit in units]

    monkeypatch.setattr(runner, "_in_parallel", fail)
    records, failures = run_units([warm, unit], tmp_path, jobs=2, say=print)
    assert tried == [warm] and not records
    assert failures[unit] == "embedded/id/seed0: its warm start failed."


def test_verdicts_of_made_up_curves() -> None:
    names = list(EXPERIMENTS)
    results = {(r.claim.text, r.bed): r for r in results_of(names, runs_of(made_up_records(3)))}
    assert all(result.verdict is not None and result.seeds == (0, 1, 2) for result in results.values())
    above = results["dynamic upper ends above GRPO", "tabular"].verdict
    assert (
        above is not None and above.reproduces == "yes" and above.mean == pytest.approx(0.6 * 0.95, abs=0.02)
    )
    rises = results["ID rises", "embedded"].verdict
    assert rises is not None and rises.reproduces == "no"
    (row,) = as_json([results["ID rises", "embedded"]])
    assert row["seeds"] == [0, 1, 2] and row["margin"]["reproduces"] == "no" and row["unit"] == "nats"


def test_claims_without_their_runs_are_said_not_to_have_been_run() -> None:
    records = {unit: record for unit, record in made_up_records(2).items() if unit.variant != "dynamic_upper"}
    results = results_of(["dynamic"], runs_of(records))
    missing = [r for r in results if "dynamic_upper" in r.claim.quantity.variants]
    assert missing and all(r.verdict is None for r in missing)
    assert counts(results)["not run"] == len(missing) < len(results)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    curves = runs_of(made_up_records(2))
    names = ["regions", "pass_at_k", "thresholds", "static", "controller"]  # all kinds of panels
    plots = {name: png for name in names if (png := command.draw(EXPERIMENTS[name], curves)) is not None}
    assert list(plots) == names and all(len(png) < 150_000 for png in plots.values())
    about = page.About(
        command="megatron-fec study", scale="full", seeds=2, jobs=2, constants=("Lines <here>",),
        unit_seconds=60.0, wall_seconds=30.0, failures=("tabular/id/seed0: no",),
    )  # fmt: skip
    results = results_of(names, curves)
    page.write_results(tmp_path, names, results, plots, about)
    assert {path.name for path in tmp_path.iterdir()} == {
        "study.html", "README.md", "verdicts.json", *(f"{name}.png" for name in names),
    }  # fmt: skip
    text = (tmp_path / "study.html").read_text()
    assert text.count("data:image/png;base64,") == len(names) and "://" not in text
    assert "Lines &lt;here&gt;" in text and "ID is above static ID" in text and "tabular/id/seed0: no" in text
    markdown = (tmp_path / "README.md").read_text()
    assert "`megatron-fec study`" in markdown and "![Static thresholds" in markdown
    title = EXPERIMENTS["controller"].title
    assert f"- {title} - tabular bandit: cosine to half: mean error at most 0.05 (-" in markdown
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert len(verdicts["results"]) == len(results) and verdicts["about"]["versions"]["torch"]
    assert verdicts["about"]["seeds"] == 2 and "cores" in verdicts["about"]["machine"]


def test_a_micro_study_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "QUICK", MICRO)
    arguments = ["study", "--quick", "--seeds", "1", "--jobs", "2", "--only", "phase_ratio"]
    arguments += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "8/8" in result.stdout and result.stdout.endswith(
        f"study       {tmp_path / 'out' / 'study.html'}\n"
    )
    assert (tmp_path / "out" / "phase_ratio.png").is_file()
    margins = [r["margin"] for r in json.loads((tmp_path / "out" / "verdicts.json").read_text())["results"]]
    assert len(margins) == 7 and all(margin["reproduces"] == "unclear" for margin in margins)  # of one seed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "regins"], "--only=regins must be one of regions, dynamic"),
        (["--only", "regins"], "Did you mean regions?"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
    ],
)
def test_bad_input_is_said_in_one_line(tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(
        cli.app, ["study", "--runs", str(tmp_path), "--output", str(tmp_path), *arguments]
    )
    assert result.exit_code == 2 and expected in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_embedded_units_train_with_the_real_trainer(tmp_path: Path) -> None:
    unit = Unit(bed="embedded", variant="target", seed=0, steps=2, warm_steps=4)
    records, failures = run_units([warm_start_of(unit), unit], tmp_path, jobs=2, say=print)
    assert not failures
    rows = records[unit].rows
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0][ENTROPY] > 0 and f"{PASS_AT}32" in rows[1] and "train_optim/dH/region_E1" in rows[0]
    run = tmp_path / unit.name / "run"
    assert not any((run / name).exists() for name in units.LEFT_BEHIND) and (run / "metrics.jsonl").is_file()
    lost = replace(unit, seed=1)  # without a warm start
    _, failures = run_units([lost], tmp_path, jobs=1, say=print)
    assert "embedded/target/seed1: training ended with exit code 2" in failures[lost]
    assert "model.path" in (tmp_path / lost.name / "log.txt").read_text()
