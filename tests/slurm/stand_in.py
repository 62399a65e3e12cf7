#!/usr/bin/env python3
"""Stands in for PYTHON where a test asks only what the shell part does: notes how it was started, then acts as told.

STAND_IN is ROLE=ACTION,... for the roles train, doctor and serve; NOTES names the folder of the notes, one file a process.
  finish  leaves DONE in the run folder        stop  exit code 0 without DONE, a stop at a checkpoint
  fail    exit code 3 on the second node, while the first goes on       die  exit code 4
  wait    until a SIGUSR1, then stop; finish after a requeue            serve   says it is ready, until SIGTERM
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

ENVIRONMENT = ("SLURM", "CUDA_VISIBLE_DEVICES", "MASTER_", "FAKE_PYXIS_", "ENGINE_")


def main() -> None:
    role = next(word for word in ("train", "doctor", "serve", "evaluate") if f"launch/{word}.py" in sys.argv)
    action = dict(pair.split("=") for pair in os.environ["STAND_IN"].split(",")).get(role, "stop")
    asked: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    note(role)
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if action == "die":
        sys.exit(4)
    if action == "fail":
        if os.environ["SLURM_PROCID"] == "1":
            sys.exit(3)
        until_asked(asked, signal.SIGTERM)
    if action == "wait" and not restarted:
        until_asked(asked, signal.SIGUSR1, signal.SIGTERM)
    if action == "serve":
        engines = run_dir() / "engines"
        assert (engines / "key").stat().st_mode & 0o777 == 0o600
        (engines / f"{os.environ['SLURM_PROCID']}.json").touch()
        until_asked(asked, signal.SIGTERM)
    if action == "finish" or (action == "wait" and restarted):
        run_dir().mkdir(parents=True, exist_ok=True)
        (run_dir() / "DONE").touch()


def until_asked(asked: list[int], *numbers: int) -> None:
    while not set(numbers) & set(asked):
        time.sleep(0.05)


def run_dir() -> Path:
    return Path(next(word.split("=")[1] for word in sys.argv if word.startswith("trainer.run_dir=")))


def note(role: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)}
    name = f"{time.time():.6f}.{role}.{environment['SLURM_JOB_ID']}.{environment['SLURM_PROCID']}"
    writing = Path(os.environ["NOTES"]) / f".{name}"
    writing.write_text(json.dumps({"role": role, "argv": sys.argv[1:], "environment": environment}))
    writing.rename(writing.with_name(name))


main()
