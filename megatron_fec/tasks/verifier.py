"""The worker processes that score responses, each under a deadline.

Responses are untrusted text that meets sympy, which can loop for ever, exhaust memory or crash, and a Python
thread cannot be stopped. So scorers (scorers.py) run in processes; one that passes its deadline is killed and replaced.
Workers start by `python -c`, not by multiprocessing, whose spawn imports the parent's main module, and torch.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from megatron_fec.security import without_secrets
from megatron_fec.types import SampleGroup

START_SECONDS = 300.0  # for a worker's imports, which a cold network file system makes slow
ANSWER_BYTES = 4096  # a longer one is garbage
SCORERS_MODULE = "megatron_fec.tasks.scorers"
WORKER_MODULE = "megatron_fec.tasks.verifier_worker"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierResult:
    rewards: list[list[float]]  # one list a group, one number a sample
    timeouts: int  # samples that passed the deadline; their reward is 0
    crashes: int  # samples whose scorer raised or took its worker down; their reward is 0


@dataclass(frozen=True, slots=True)
class Verdict:
    reward: float
    is_timeout: bool = False
    is_crash: bool = False


Handle = list[list[Future[Verdict]]]  # one list a group, one future a sample


class Verifier:
    """A pool of scoring processes, started once and kept warm."""

    def __init__(self, workers: int, timeout: float, *, scorers: str = SCORERS_MODULE) -> None:
        """timeout: seconds for one response. scorers: the module whose SCORERS the workers import."""
        assert workers >= 1 and timeout > 0
        self._names = frozenset(importlib.import_module(scorers).SCORERS)
        self._new_worker = lambda: _Worker(scorers, timeout)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(self._new_worker())
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")  # one feeds one worker

    def start_step(self, groups: Sequence[SampleGroup]) -> Handle:
        """Queues every sample and returns at once; the handle goes to finish_step."""
        for name in {group.prompt.verifier for group in groups} - self._names:
            raise ValueError(f"verifier {name!r} is unknown. Use one of {', '.join(sorted(self._names))}.")
        return [
            [
                self._threads.submit(self._score, [prompt.verifier, sample.text, prompt.answer, prompt.extra])
                for sample in group.samples
            ]
            for group in groups
            for prompt in (group.prompt,)
        ]

    def finish_step(self, handle: Handle) -> VerifierResult:
        """Waits for all verdicts of one step; groups and samples are in the order of start_step."""
        verdicts = [[future.result() for future in futures] for futures in handle]
        return VerifierResult(
            rewards=[[verdict.reward for verdict in group] for group in verdicts],
            timeouts=sum(verdict.is_timeout for group in verdicts for verdict in group),
            crashes=sum(verdict.is_crash for group in verdicts for verdict in group),
        )

    def close(self) -> None:
        """Drops what is queued, waits for what runs, and ends the workers."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().kill()

    def _score(self, task: list[str]) -> Verdict:
        worker = self._idle.get()  # never blocks: as many threads as workers
        try:
            if not worker.is_alive():  # killed from outside while idle: no response is lost
                logger.warning("an idle verifier worker died; it is replaced")
                worker.kill()
                worker = self._new_worker()
            verdict = worker.score(task)
            if not worker.is_alive():
                worker = self._new_worker()
            return verdict
        finally:
            self._idle.put(worker)


class _Worker:
    """One scoring process and our end of its socket."""

    def __init__(self, scorers: str, timeout: float) -> None:
        self._socket, theirs = socket.socketpair()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {WORKER_MODULE} import work; "
        code += f"work({theirs.fileno()}, {scorers!r}, {timeout!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            env=without_secrets(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self._timeout = timeout
        self._is_ready = False
        self._asked = 0  # requests so far: an answer that does not repeat the number is not to this one

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def score(self, task: list[str]) -> Verdict:
        """The verdict of one [verifier, response, answer, extra]; a hang or crash leaves a dead worker.

        The deadline covers the request, which a worker that is stopped would never take, and every byte of the answer.
        """
        self._await_ready()
        deadline = time.monotonic() + self._timeout
        try:
            self._socket.settimeout(self._timeout)
            self._asked += 1
            self._socket.sendall(json.dumps([self._asked, *task]).encode() + b"\n")
            answer = json.loads(self._line(deadline))
            if answer["number"] != self._asked:
                raise ValueError("an answer to something else")
            if "error" in answer:
                logger.warning("the %s verifier failed with %s; %s", task[0], answer["error"], _culprit(task))
                return Verdict(0.0, is_crash=True)
            reward = answer["reward"]
            if not 0 <= reward <= 1:  # NaN too
                raise ValueError(f"the reward {reward}")
            return Verdict(float(reward))
        except TimeoutError:
            self.kill()
            logger.warning("the %s verifier passed its %g s; %s", task[0], self._timeout, _culprit(task))
            return Verdict(0.0, is_timeout=True)
        except (EOFError, OSError):
            self.kill()
            logger.warning("a verifier worker died with %s; %s", self._process.returncode, _culprit(task))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.kill()
            logger.warning("the %s verifier gave no reward but %.200s; %s", task[0], error, _culprit(task))
        return Verdict(0.0, is_crash=True)

    def _line(self, deadline: float) -> bytes:
        """The next line of the worker; TimeoutError at the deadline, EOFError where it has closed."""
        line = b""
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
            part = self._socket.recv(ANSWER_BYTES)
            if not part:
                raise EOFError
            line += part
            if len(line) > ANSWER_BYTES:
                raise ValueError(f"more than {ANSWER_BYTES} bytes")
        return line

    def _await_ready(self) -> None:
        """The deadline of a response must not pay for the imports of a fresh worker."""
        if self._is_ready:
            return
        try:
            self._is_ready = bool(self._line(time.monotonic() + START_SECONDS))
        except (EOFError, OSError) as error:  # it ended during its imports, with a traceback on stderr
            self.kill()
            raise RuntimeError(
                f"a verifier worker did not start (exit status {self._process.returncode}). "
                f"Its traceback is above; `{sys.executable} -c 'import {SCORERS_MODULE}'` should work."
            ) from error


def _culprit(task: list[str]) -> str:
    return f"reward 0 for answer {task[2][:40]!r} and a response that ends in {task[1][-120:]!r}"
