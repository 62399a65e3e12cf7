"""How a run that is told to stop, by a signal or its time limit, stops: on all ranks at one place, with nothing lost.

SIGUSR1 and SIGTERM are blocked, and with that in every thread and process that a rank starts: torchrun and Slurm signal
all processes of a rank, and a verifier or one of Megatron's helpers that died of it would spoil the step or the
checkpoint. A blocked signal waits until the rank asks for it, at a place where it could stop.
"""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_fec.policy.device import device

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
REASONS = (
    "",
    "the time limit (--end-time)",
    "SIGUSR1",
    "SIGTERM",
)  # ranks agree on the last that any of them has
MARGIN_FACTOR = 1.5  # a step may take so much longer than the slowest before it
MARGIN_SECONDS = 10.0  # to leave, with clocks that differ between nodes
DONE = "DONE"  # in the run folder: trainer.max_steps are done, hf/ and report.html are written

_caught: set[int] = set()  # signals that reached a thread which was older than the mask


class StopRequested(Exception):  # noqa: N818 - nothing went wrong
    """Every rank raises it at the same place; the text is the reason."""


class Stop:
    """One rank's view of what may stop the run."""

    def __init__(self, end_time: float | None = None) -> None:
        """end_time: seconds of the epoch, the wall; None is no limit."""
        self._end_time = end_time
        self._slowest: dict[str, float] = {}

    def learn(self, seconds: Mapping[str, float]) -> None:
        """Keeps the longest time that each part of a step has taken in this process."""
        for name, value in seconds.items():
            self._slowest[name] = max(value, self._slowest.get(name, 0.0))

    def check(self, *ahead: str) -> None:
        """Raises StopRequested on every rank if any has a reason; one collective of one number.

        ahead: the parts that must still fit before the wall, by their names in `learn`; one never seen takes no time,
        a save as long as a step.
        """
        own = self._signal_reason() or int(not self._fits(ahead))
        reason = torch.tensor(own, device=device())
        dist.all_reduce(reason, op=dist.ReduceOp.MAX)
        if int(reason):
            raise StopRequested(REASONS[int(reason)])

    def _fits(self, ahead: tuple[str, ...]) -> bool:
        if self._end_time is None:
            return True
        slowest = {"save": self._slowest.get("step", 0.0)} | self._slowest
        needed = sum(slowest.get(name, 0.0) for name in ahead)
        return time.time() + MARGIN_FACTOR * needed + MARGIN_SECONDS < self._end_time

    def _signal_reason(self) -> int:
        """Index into REASONS of the signals that have arrived so far, 0 if none."""
        while (info := signal.sigtimedwait(SIGNALS, 0)) is not None:
            _caught.add(info.si_signo)
        return max((REASONS.index(signal.Signals(number).name) for number in _caught), default=0)


def listen() -> None:
    """From here on the signals wait for Stop.check; call it in the main thread, before other threads start.

    Also where the parent ignored them: a launcher shields torchrun, which dies of SIGUSR1, by `trap "" USR1`.
    """
    for number in SIGNALS:
        signal.signal(number, _catch)
    # Started now, because starting it unblocks SIGTERM, for all that the library which needs it starts afterwards too.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def end_time(text: str) -> float:
    """The value of --end-time; a word, nan or infinity is refused."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(
            f"{text} must be a number: seconds of the epoch, as `date +%s` prints"
        )
    return value


def is_done(run_dir: Path, *, step: int | None, max_steps: int) -> bool:
    """Whether the run has nothing left to do: finished at the step of its newest checkpoint, and asked for no more.

    Rank 0 looks and all follow; a mark that holds no longer is removed.
    """
    answer = [False]
    if dist.get_rank() == 0:
        mark = run_dir / DONE
        finished = step is not None and step >= max_steps and (run_dir / "hf").is_dir()
        answer = [finished and mark.is_file() and mark.read_text().strip() == str(step)]
        if not answer[0]:
            mark.unlink(missing_ok=True)
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def mark_done(run_dir: Path, *, step: int) -> None:
    """Says that the run is finished; on one rank, when all it leaves is written."""
    writing = run_dir / f".writing_{DONE}"
    writing.write_text(f"{step}\n")
    writing.replace(run_dir / DONE)


def _catch(number: int, frame: FrameType | None) -> None:
    _caught.add(number)
