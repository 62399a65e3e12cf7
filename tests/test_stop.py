"""Stopping: who notices what, and that a run stopped anywhere and started again is the run that was left alone.

The runs are real ones on forked gloo ranks, stopped by real signals; test_stop_processes.py has runs under torchrun.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy_fixtures import allow_children
from ranks import run_on_ranks
from run_fixtures import CONFIG, ROOT, SETTINGS, SMALL, assert_same_weights, rows_of

from megatron_fec import launcher
from megatron_fec.config import load_config
from megatron_fec.job import train
from megatron_fec.stop import DONE, SIGNALS, Stop, StopRequested, listen, mark_done

MAX_STEPS = SMALL["trainer.max_steps"]
CLEAN = {"unwritten": {}}  # of a checkpoint that waits for no validation


def overrides(run_dir: Path, settings: dict[str, Any]) -> list[str]:
    return [
        f"{key}={value}"
        for key, value in (SETTINGS | SMALL | {"trainer.run_dir": run_dir} | settings).items()
    ]


def run(
    run_dir: Path, *, stop_at: int = 0, rank: int = 0, number: int = signal.SIGUSR1, **settings: Any
) -> None:
    """Trains on two ranks; one of them gets a signal just before its check number `stop_at`, counted from 1."""
    config = load_config(CONFIG, overrides(run_dir, settings))

    def job(own_rank: int) -> None:
        allow_children()
        listen()
        random.seed(5)  # unlike torch's, a run does not seed these two
        np.random.seed(5)
        check, count = Stop.check, itertools.count(1)

        def check_with_signal(self: Stop, *ahead: str) -> None:
            if next(count) == stop_at and own_rank == rank:
                signal.raise_signal(number)
            check(self, *ahead)

        Stop.check = check_with_signal  # of this process, a fork
        train(config)

    run_on_ranks(2, job)


def checkpoint_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def assert_same_checkpoint(run_dir: Path, other: Path, step: int) -> None:
    """State and random states; the weights show in the end, and Megatron's files are not reproducible."""
    one, two = (path / "checkpoints" / f"step_{step:06d}" for path in (run_dir, other))
    states = [json.loads((path / "trainer_state.json").read_text()) for path in (one, two)]
    assert states[0]["trainer"] | CLEAN == states[1]["trainer"] | CLEAN
    for rank in range(2):
        first, second = (plain(torch.load(path / f"rng_{rank:05d}.pt")) for path in (one, two))
        assert first == second


def plain(value: Any) -> Any:
    """The same without tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(run_dir, **{"trainer.save_every": 1})
    return run_dir


@pytest.mark.slow
def test_the_run_that_is_compared_with_moves(undisturbed: Path) -> None:
    rows = rows_of(undisturbed)
    assert len(rows) == MAX_STEPS and (undisturbed / DONE).read_text() == f"{MAX_STEPS}\n"
    assert all(row["train_optim/grad_norm"] > 0 for row in rows)
    assert ["val_rollouts/pass_at_k/1" in row for row in rows] == [False, True, False, True]
    state = json.loads((undisturbed / "checkpoints/step_000002/trainer_state.json").read_text())["trainer"]
    assert state["strategies"]["adaptive_entropy"]["alpha"] > 0 and state["strategies"]["reward_history"]


@pytest.mark.slow
def test_a_run_stopped_at_every_kind_of_point_is_the_undisturbed_one(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    # A step has three checks, and a fourth before its validation.
    starts = [
        (1, 0, signal.SIGUSR1, 0),  # before the first step
        (2, 1, signal.SIGTERM, 0),  # after generation
        (3, 0, signal.SIGUSR1, 0),  # after the log-prob pass
        (7, 1, signal.SIGUSR1, 2),  # before the validation after step 2
        (1, 1, signal.SIGTERM, 2),  # the same one, made up for
        (4, 0, signal.SIGTERM, 2),  # the log-prob pass of the step after that
        (5, 1, signal.SIGUSR1, 3),  # between steps
        (4, 0, signal.SIGTERM, 4),  # before the validation after the last step
    ]
    away = {"policy.options.offload": "all"}  # each stop finds the policy where the phase before it left it
    for stop_at, rank, number, steps in starts:
        run(run_dir, stop_at=stop_at, rank=rank, number=number, **away)
        text = capfd.readouterr().out
        note = f"stopped by {signal.Signals(number).name} after {steps} of {MAX_STEPS} steps: nothing is lost"
        assert note in text
        assert not (run_dir / DONE).exists() and not (run_dir / "hf").exists()
        if steps:
            assert checkpoint_steps(run_dir)[-1] == steps
            assert_same_checkpoint(run_dir, undisturbed, steps)
        else:
            assert not (run_dir / "checkpoints").exists()
        assert len(rows_of(run_dir)) in (steps, steps - 1)
    run(run_dir)
    assert (run_dir / DONE).is_file()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["timers/train"] > 0 for row in rows), "also of the rows that a stop put off"
    assert rows_of(run_dir) == rows_of(undisturbed)
    assert_same_weights(run_dir / "hf", undisturbed / "hf")


def test_what_is_saved_is_not_saved_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", stop_at=7, **{"trainer.save_every": 1, "trainer.eval_every": 0})
    assert capfd.readouterr().out.count("saved ") == 2  # after each step; the stop before the third adds none


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_is_timed_until_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    learn, learned = Stop.learn, tmp_path / "learned"

    def noted(self: Stop, seconds: Mapping[str, float]) -> None:
        with learned.open("a") as file:
            file.write("".join(f"{name}\n" for name, value in seconds.items() if value > 0))
        learn(self, seconds)

    monkeypatch.setattr(Stop, "learn", noted)
    run(tmp_path / "run", **{"trainer.async_save": in_background, "trainer.max_steps": 1})
    names = learned.read_text().split()
    assert names.count("save") == 2 and names.count("step") == 2  # of two ranks


@pytest.mark.slow
def test_a_finished_run_is_left_alone_until_it_shall_do_more(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    run(run_dir)
    assert f"is finished at step {MAX_STEPS}. Raise trainer.max_steps to train on." in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    (run_dir / "hf" / "config.json").unlink()
    mark_done(run_dir, step=MAX_STEPS - 1)  # of an earlier end
    run(run_dir)
    assert (run_dir / "hf" / "config.json").is_file()
    assert (run_dir / DONE).read_text() == f"{MAX_STEPS}\n"
    run(run_dir, stop_at=2, **{"trainer.max_steps": MAX_STEPS + 1})
    assert not (run_dir / DONE).exists()


def test_the_warm_start_is_given_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", stop_at=3, number=signal.SIGTERM, **{"warm_start.steps": 3})
    assert "stopped by SIGTERM: nothing is lost" in capfd.readouterr().out
    assert not (tmp_path / "run" / "warm_start" / "made_with.json").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_command_line_knows_the_wall(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def job(rank: int, *arguments: str) -> int:
        sys.argv = ["train.py", "--config", CONFIG, *arguments]
        try:
            launcher.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    settings = overrides(tmp_path / "run", {"policy.tensor_parallel": 1})
    assert run_on_ranks(1, job, *settings, "--end-time", str(time.time() + 2)) == [0]
    assert (
        "stopped by the time limit (--end-time) after 0 of 4 steps: nothing is lost" in capfd.readouterr().out
    )
    for value, message in (
        ("soon", "invalid end_time value: 'soon'"),
        ("nan", "nan must be a number: seconds"),
    ):
        assert run_on_ranks(1, job, *settings, f"--end-time={value}") == [2]
        assert f"argument --end-time: {message}" in capfd.readouterr().err


# ------------------------------------------------------------------ the agreement


def reasons(
    *, signals: dict[int, list[int]], end_times: dict[int, float], ahead: tuple[str, ...]
) -> list[str]:
    """What two ranks raise, after a step of 100 s and generation of 60 s: "" is nothing."""

    def job(rank: int) -> str:
        listen()
        for number in signals.get(rank, []):
            signal.raise_signal(number)
        stop = Stop(end_times.get(rank))
        stop.learn({"step": 90.0, "train": 40.0})
        stop.learn({"step": 100.0, "train": 30.0})
        try:
            stop.check(*ahead)
        except StopRequested as request:
            return str(request)
        return ""

    return run_on_ranks(2, job)


@pytest.mark.parametrize(
    ("signals", "wanted"),
    [
        ({}, ""),
        ({1: [signal.SIGUSR1]}, "SIGUSR1"),
        ({0: [signal.SIGTERM]}, "SIGTERM"),
        ({0: [signal.SIGUSR1, signal.SIGUSR1], 1: [signal.SIGTERM]}, "SIGTERM"),
        ({1: [signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM]}, "SIGTERM"),
    ],
)
def test_one_signal_on_one_rank_stops_both(signals: dict[int, list[int]], wanted: str) -> None:
    assert reasons(signals=signals, end_times={}, ahead=()) == [wanted, wanted]


@pytest.mark.parametrize(
    ("seconds_left", "ahead", "is_enough"),
    [
        (400.0, ("step", "save"), True),  # 1.5 x (100 + 100, as no save was seen) + 10 = 310
        (250.0, ("step", "save"), False),
        (250.0, ("train", "save"), True),  # 1.5 x (40 + 100) + 10 = 220
        (200.0, ("train", "save"), False),
        (60.0, ("validate",), True),  # never seen
        (-1.0, (), False),
    ],
)
def test_a_rank_that_sees_the_wall_stops_both(
    seconds_left: float, ahead: tuple[str, ...], is_enough: bool
) -> None:
    wanted = "" if is_enough else "the time limit (--end-time)"
    found = reasons(signals={}, end_times={1: time.time() + seconds_left}, ahead=ahead)
    assert found == [wanted, wanted]


def test_an_inherited_ignore_does_not_hide_the_signal() -> None:
    """A launcher that shields torchrun by `trap "" USR1` shields the ranks too, until they listen."""

    def job(rank: int) -> str:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.raise_signal(signal.SIGUSR1)  # lost: nobody listens yet
        Stop().check()
        listen()
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(StopRequested) as request:
            Stop().check()
        return str(request.value)

    assert run_on_ranks(1, job) == ["SIGUSR1"]


def test_what_the_run_starts_blocks_the_signals_too() -> None:
    """Python's resource tracker, which vLLM and Megatron's helpers bring, unblocks SIGTERM where it is started."""
    code = (
        "import subprocess, sys; from multiprocessing import resource_tracker; from megatron_fec.stop import listen; "
        "listen(); resource_tracker.ensure_running(); "
        "subprocess.run(['grep', 'SigBlk', '/proc/self/status'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    mask = int(done.stdout.split()[1], 16)
    assert mask == sum(1 << number - 1 for number in SIGNALS)


def test_a_signal_that_an_older_thread_takes_counts() -> None:
    """A thread that was there before the mask, such as a library's, does not block the signal."""

    def check_for_ever() -> None:
        while True:
            Stop().check()

    def job(rank: int) -> str:
        ready, end = threading.Event(), threading.Event()
        older = threading.Thread(target=lambda: (ready.set(), end.wait()))
        older.start()
        ready.wait()
        listen()
        assert older.ident is not None
        signal.pthread_kill(older.ident, signal.SIGUSR1)
        with pytest.raises(StopRequested) as request:
            check_for_ever()  # the thread takes the signal in its own time
        end.set()
        older.join()
        return str(request.value)

    assert run_on_ranks(1, job) == ["SIGUSR1"]
