"""The local Slurm cluster of the tests: its commands, its jobs, and waiting for what happens there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("local_slurm.sh")
STAND_IN = Path(__file__).with_name("stand_in.py")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")  # NODE_FAIL and PREEMPTED go on to PENDING


def until(condition: Callable[[], Any], *, seconds: float, what: Callable[[], str]) -> Any:
    """The first true value of condition, which Slurm offers no way to be woken by; AssertionError when it takes too long."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what()}"
        time.sleep(0.1)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    name: str  # COMPLETED, FAILED, ...
    code: int
    restarts: int
    nodes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    cluster: Cluster
    id: str
    output: Path

    def state(self) -> JobState:
        text = self.cluster.run("scontrol", "-o", "show", "job", self.id)
        fields = dict(re.findall(r"(\w+)=(\S*)", text))
        return JobState(
            name=fields["JobState"],
            code=int(fields["ExitCode"].split(":")[0]),
            restarts=int(fields["Restarts"]),
            nodes=fields["NodeList"],
        )

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def ended(self, seconds: float = 300) -> JobState:
        """Its state when it has ended."""
        until(lambda: self.state().name in ENDED, seconds=seconds, what=self._story)
        return self.state()

    def reaches(self, condition: Callable[[], Any], seconds: float = 180) -> None:
        """Waits for something that the job does; AssertionError as soon as it has ended without."""

        def happens_or_never_will() -> bool:
            has_ended = self.state().name in ENDED
            happens = bool(condition())
            assert happens or not has_ended, self._story()
            return happens

        until(happens_or_never_will, seconds=seconds, what=self._story)

    def restarted(self, count: int, seconds: float = 180) -> None:
        """Waits until the job runs again, for the count-th time."""

        def runs_again() -> bool:
            state = self.state()
            return state.restarts == count and state.name in ("RUNNING", *ENDED)

        self.reaches(runs_again, seconds)

    def signal_shell(self, name: str) -> None:
        """As the time limit does: to the batch script alone."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.id)

    def _story(self) -> str:
        return "\n".join([f"job {self.id}: {self.state()}", *self.text().splitlines()[-60:]])


class Cluster:
    """Nodes n1 to n3 with two fake GPUs each."""

    def __init__(self, folder: Path) -> None:
        """folder: a short path, for Unix sockets; the tests' files go there too."""
        self.folder = folder
        self._jobs = 0

    def control(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """A command of local_slurm.sh; its standard output."""
        line = [str(SCRIPT), "-d", str(self.folder / "slurm"), *command]
        # No pipe for standard error: what `up` leaves running would hold it open.
        with (self.folder / "errors").open("w+") as errors:
            done = subprocess.run(
                line,
                cwd=ROOT,
                env=os.environ | dict(env or {}),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            errors.seek(0)
            assert done.returncode == 0, f"{line} gave {done.returncode}: {done.stdout}{errors.read()}"
        return done.stdout

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """A command on the login node."""
        return self.control("exec", *command, env=env)

    def submit(
        self,
        script: str,
        *arguments: str,
        options: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """sbatch OPTIONS slurm/SCRIPT ARGUMENTS, with two tasks a node at most."""
        self._jobs += 1
        output = self.folder / f"job{self._jobs}.out"
        line = [
            "sbatch",
            "--parsable",
            "--gpus-per-node=2",
            f"--output={output}",
            *options,
            f"slurm/{script}",
        ]
        return Job(cluster=self, id=self.run(*line, *arguments, env=env).strip(), output=output)

    def stand_in(self, actions: str, name: str, **settings: str) -> dict[str, str]:
        """The environment of a job with the stand-in for PYTHON; notes and run folder go below `name`."""
        notes = self.folder / name / "notes"
        notes.mkdir(parents=True)
        return {
            "PYTHON": str(STAND_IN),
            "STAND_IN": actions,
            "NOTES": str(notes),
            "RUN_DIR": str(self.folder / name / "run"),
            "CONFIG": "configs/tiny_cpu.yaml",
        } | settings

    def notes(self, name: str, role: str = "train") -> list[dict[str, Any]]:
        """What the stand-in's processes of a role have noted so far, oldest first."""
        files = sorted((self.folder / name / "notes").glob(f"[0-9]*.{role}.*"))
        return [json.loads(file.read_text()) for file in files]
