import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_fec.config import ConfigError
from megatron_fec.run_log import (
    COLUMNS,
    RunLog,
    Timers,
    heading_line,
    read_rows,
    start_middle_end,
    step_line,
    summary_rows,
    summary_table,
)

ROOT = Path(__file__).resolve().parent.parent


def make_log(run_dir: Path, *, total_steps: int = 7, is_main: bool = True, wandb_mode: str = "off") -> RunLog:
    config = "trainer: {max_steps: 7}"
    return RunLog(
        run_dir, total_steps=total_steps, is_main=is_main, wandb_mode=wandb_mode, config_text=config
    )


def test_rows_are_on_disk_as_they_are_written(tmp_path: Path):
    log = make_log(tmp_path / "new" / "run")
    log.truncate_to(0)
    for step in range(3):
        log.write(step, {"train_rollouts/reward": 0.25 * step})
        lines = log.path.read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": step, "train_rollouts/reward": 0.25 * step}
    assert len(lines) == 3


def test_truncation_drops_the_resumed_step_later_ones_and_a_torn_line(tmp_path: Path):
    log = make_log(tmp_path)
    for step in range(5):
        log.write(step, {"a": float(step)})
    with log.path.open("a") as file:
        file.write('{"step": 5, "a": 0.')
    log.truncate_to(3)
    log.write(3, {"a": 30.0})
    assert read_rows(log.path) == [*({"step": s, "a": float(s)} for s in range(3)), {"step": 3, "a": 30.0}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_to_0_starts_over_and_a_missing_file_is_fine(tmp_path: Path):
    log = make_log(tmp_path)
    log.truncate_to(4)
    assert read_rows(log.path) == []
    log.write(0, {"a": 1.0})
    log.truncate_to(0)
    assert log.path.read_text() == ""


def test_a_failed_truncation_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = make_log(tmp_path)
    log.write(0, {"a": 1.0})
    before = log.path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        log.truncate_to(0)
    assert log.path.read_text() == before


@pytest.mark.parametrize("broken", ['{"step": 1, "a"', "[1]", '{"a": 1.0}', "", '{"step": 1, "a": "x"}'])
def test_a_broken_line_inside_the_file_is_named(tmp_path: Path, broken: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not a metrics row"):
        read_rows(path)


def test_values_that_json_does_not_know_are_left_out(tmp_path: Path):
    log = make_log(tmp_path)
    log.write(0, {"a": math.nan, "b": math.inf, "c": 2.0})
    assert json.loads(log.path.read_text()) == {"step": 0, "a": None, "b": None, "c": 2.0}
    assert read_rows(log.path) == [{"step": 0, "c": 2.0}]


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = make_log(tmp_path / "run", is_main=False, wandb_mode="online")
    log.truncate_to(0)
    log.write(0, {"a": 1.0})
    log.note("hello")
    log.finish()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_a_pipe_gets_plain_lines_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = make_log(tmp_path, total_steps=3)
    log.note("warming up [1/2]")
    for step in range(3):
        log.write(step, {key: 0.5 for _, key, _ in COLUMNS} | {"timers/step": 1.0})
    log.finish()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "warming up [1/2]"
    assert lines[1].split() == ["step", *(name for name, _, _ in COLUMNS), "ETA"]
    assert [line.split()[0] for line in lines[2:5]] == ["1/3", "2/3", "3/3"]
    assert [line.split()[-1] for line in (lines[2], lines[4])] == ["0:00:02", "0:00:00"]
    assert any("reward" in line and "0.5" in line for line in lines[5:])


def test_a_terminal_gets_the_lines_and_a_bar(tmp_path: Path):
    log = make_log(tmp_path, total_steps=2)
    with (tmp_path / "screen").open("w+") as screen:
        log._console = Console(file=screen, force_terminal=True, width=120, highlight=False)
        log.write(0, {"train_rollouts/reward": 0.125})
        log.write(1, {"train_rollouts/reward": 0.25})
        log.finish()
        screen.seek(0)
        text = screen.read()
    assert "0.125" in text
    assert "2/2" in text
    assert "end" in text


def test_columns_line_up_also_where_metrics_are_missing():
    full = {"step": 3, "timers/step": 1.0} | {key: 0.5 for _, key, _ in COLUMNS}
    widths = {len(heading_line(40)), len(step_line(full, 40, 3725.0)), len(step_line({"step": 39}, 40, 0.0))}
    assert len(widths) == 1
    assert step_line(full, 40, 3725.0).endswith("1:02:05")
    assert step_line({"step": 39}, 40, 0.0).split().count("-") == len(COLUMNS)


def test_start_middle_end_average_a_tenth():
    rows = [{"step": s, "a": float(s)} for s in range(20)]
    assert start_middle_end(rows, "a") == (0.5, 9.5, 18.5)
    assert start_middle_end(rows[:3], "a") == (0.0, 1.0, 2.0)
    assert start_middle_end(rows[:1], "a") == (0.0, 0.0, 0.0)
    assert start_middle_end(rows, "b") is None


def test_start_middle_end_looks_only_at_rows_with_the_metric():
    rows = [{"step": s} | ({"a": float(s)} if s % 5 == 0 else {}) for s in range(11)]
    assert start_middle_end(rows, "a") == (0.0, 5.0, 10.0)


def test_summary_shows_each_validation_metric_by_its_name():
    rows = [
        {
            "step": 0,
            "val_rollouts/pass_at_k/16": 0.5,
            "val_rollouts/pass_at_k/2": 0.25,
            "train_rollouts/entropy": 1.5,
        }
    ]
    expected = [("entropy", (1.5,) * 3), ("pass@k 2", (0.25,) * 3), ("pass@k 16", (0.5,) * 3)]
    assert summary_rows(rows) == expected
    assert summary_table(rows).row_count == 3
    assert summary_table([]).row_count == 0


def test_timers_add_up_survive_errors_and_reset():
    timers = Timers()
    for _ in range(2):
        with timers("a"):
            time.sleep(0.01)
    with pytest.raises(KeyError), timers("b"):
        raise KeyError
    assert timers.seconds()["a"] >= 0.02
    assert set(timers.seconds()) == {"a", "b"}
    timers.reset()
    assert timers.seconds() == {}


def test_wandb_that_is_not_installed_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"trainer\.wandb=offline needs the wandb package.*trainer\.wandb=off"
    ):
        make_log(tmp_path, wandb_mode="offline")


WANDB_RUN = """
from pathlib import Path
from megatron_fec.run_log import RunLog
log = RunLog(Path("run"), total_steps=1, is_main=True, wandb_mode="offline", config_text="a: {b: 1}")
log.write(0, {"train_rollouts/reward": 0.5})
log.finish()
"""


@pytest.mark.slow
def test_wandb_offline_writes_a_run_without_a_login(tmp_path: Path):
    pytest.importorskip("wandb")
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")
    settings = {**os.environ, **{name: str(tmp_path / "home") for name in names}, "PYTHONPATH": str(ROOT)}
    # In a process of its own: wandb's service has written everything when the process has ended, not before.
    subprocess.run(
        [sys.executable, "-c", WANDB_RUN], cwd=tmp_path, env=settings, check=True, capture_output=True
    )
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert b"train_rollouts/reward" in files[0].read_bytes()
