"""Rewards: pure scorers of text, and the worker processes that run them under a deadline.

Responses are untrusted text that meets sympy, which can loop for ever, exhaust memory or crash, and a Python
thread cannot be stopped. So scorers run in processes; one that passes its deadline is killed and replaced.
Workers start by `python -c`, not by multiprocessing, whose spawn imports the parent's main module, and torch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from reasoning_gym import create_dataset

from megatron_fec.tasks.arithmetic import core_expression
from megatron_fec.types import SampleGroup

START_SECONDS = 300.0  # for a worker's imports, which a cold network file system makes slow
MEMORY_BYTES = 4 << 30  # that a worker may take beyond its imports
CACHE_SIZE = 8192  # verdicts that a worker keeps; the embedded task repeats itself
BOX = "\\boxed{"
COUNTDOWN = re.compile(r"[1-9]([-+*][1-9])*")

logger = logging.getLogger(__name__)

# ------------------------------------------------------ scorers: (response, answer, extra) -> reward


def score_math(response: str, answer: str, extra: str) -> float:
    """1 if the last box of the response, or else what math-verify extracts from it, equals the answer."""
    box = last_box(response)
    return float(_equal_latex(response if box is None else f"{BOX}{box}}}", answer))


def score_countdown(response: str, answer: str, extra: str) -> float:
    """1 if the response, without fillers, uses each of extra's numbers once and has the answer's value."""
    expression = core_expression(response)
    if COUNTDOWN.fullmatch(expression) is None:
        return 0.0
    if sorted(map(int, expression[::2])) != sorted(json.loads(extra)["numbers"]):
        return 0.0
    return float(_equal_arithmetic(expression, answer))


def score_reasoning_gym(response: str, answer: str, extra: str) -> float:
    """What reasoning-gym's own scorer gives the last box, or else the whole response; between 0 and 1."""
    task = json.loads(extra, object_hook=_restore)
    assert isinstance(task, dict)
    box = last_box(response)
    candidate = response.strip() if box is None else box
    return float(_reasoning_gym_scorer(task["dataset"])(candidate, task["entry"]))


SCORERS: dict[str, Callable[[str, str, str], float]] = {
    "math": score_math,
    "countdown": score_countdown,
    "reasoning_gym": score_reasoning_gym,
}


def last_box(text: str) -> str | None:
    r"""What the last complete \boxed{...} holds; None where there is none."""
    start = len(text)
    while (start := text.rfind(BOX, 0, start)) >= 0:
        depth = 1
        for match in re.compile(r"\\[{}]|[{}]").finditer(text, start + len(BOX)):
            depth += {"{": 1, "}": -1}.get(match[0], 0)  # an escaped brace is a character
            if depth == 0:
                return text[start + len(BOX) : match.start()]
    return None


def to_json(value: object) -> str:
    """JSON in which tuples and number keys survive: reasoning-gym's scorers tell (1, 2) from [1, 2]."""
    return json.dumps(_tagged(value), default=str)


def _tagged(value: object) -> object:
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _tagged(item) for key, item in value.items()}
        return {"__pairs__": [[_tagged(key), _tagged(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [_tagged(item) for item in value]}
    return [_tagged(item) for item in value] if isinstance(value, list) else value


def _restore(value: dict) -> object:
    if "__tuple__" in value:
        return tuple(value["__tuple__"])
    return dict(value["__pairs__"]) if "__pairs__" in value else value


# math-verify's own timeouts are off (0): C code does not notice their SIGALRM. The worker's deadline holds.
@lru_cache(maxsize=CACHE_SIZE)
def _equal_latex(text: str, answer: str) -> bool:
    return verify(_gold(answer), parse(text, parsing_timeout=0), timeout_seconds=0)


@lru_cache(maxsize=CACHE_SIZE)
def _equal_arithmetic(expression: str, answer: str) -> bool:
    value = parse(expression, [ExprExtractionConfig()], parsing_timeout=0)
    return verify(_gold(answer), value, timeout_seconds=0)


@lru_cache(maxsize=CACHE_SIZE)
def _gold(answer: str) -> list:
    gold = parse(f"{BOX}{answer}}}", [LatexExtractionConfig()], parsing_timeout=0)
    if not gold:
        raise ValueError(f"the answer {answer!r} is not LaTeX that math-verify can read")
    return gold


@cache
def _reasoning_gym_scorer(name: str) -> Callable[[str, dict], float]:
    return create_dataset(name).score_answer


# ------------------------------------------------------------------ the parent's side


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

    def __init__(self, workers: int, timeout: float, *, scorers: str = __name__) -> None:
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
        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import work; "
        code += f"work({theirs.fileno()}, {scorers!r}, {timeout!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._timeout = timeout
        self._is_ready = False

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def score(self, task: list[str]) -> Verdict:
        """The verdict of one [verifier, response, answer, extra]; a hang or crash leaves a dead worker."""
        self._await_ready()
        try:
            self._pipe.send_bytes(json.dumps(task).encode())
            if self._pipe.poll(self._timeout):
                reply = json.loads(self._pipe.recv_bytes())
                if "error" in reply:
                    logger.warning(
                        "the %s verifier failed with %s; %s", task[0], reply["error"], _culprit(task)
                    )
                    return Verdict(0.0, is_crash=True)
                return Verdict(reply["reward"])
        except (EOFError, OSError):
            self.kill()
            logger.warning("a verifier worker died with %s; %s", self._process.returncode, _culprit(task))
            return Verdict(0.0, is_crash=True)
        self.kill()
        logger.warning("the %s verifier passed its %g s; %s", task[0], self._timeout, _culprit(task))
        return Verdict(0.0, is_timeout=True)

    def _await_ready(self) -> None:
        """The deadline of a response must not pay for the imports of a fresh worker."""
        if self._is_ready:
            return
        with contextlib.suppress(
            EOFError, OSError
        ):  # it ended during its imports, with a traceback on stderr
            self._is_ready = self._pipe.poll(START_SECONDS) and bool(self._pipe.recv_bytes())
        if not self._is_ready:
            self.kill()
            raise RuntimeError(
                f"a verifier worker did not start (exit status {self._process.returncode}). "
                f"Its traceback is above; `{sys.executable} -c 'import {__name__}'` should work."
            )


def _culprit(task: list[str]) -> str:
    return f"reward 0 for answer {task[2][:40]!r} and a response that ends in {task[1][-120:]!r}"


# ------------------------------------------------------------------ the worker's side


def work(descriptor: int, scorers: str, timeout: float) -> None:
    """The life of a worker: score what comes over the socket until the parent closes it.

    Should the parent be killed during a task that hangs, SIGALRM ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the timeouts that we replace
    known = importlib.import_module(scorers).SCORERS
    _limit_memory()
    pipe = Connection(descriptor)
    pipe.send_bytes(b"ready")
    while True:
        try:
            name, *arguments = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
        try:
            reply = {"reward": known[name](*arguments)}
        except Exception as error:  # a bad response or answer must not cost the queue
            reply = {"error": repr(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(json.dumps(reply).encode())


def _limit_memory() -> None:
    """A runaway power or factorial then ends in MemoryError, in this process only. Linux only."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return
    used = int(statistics.read_text().split()[0]) * resource.getpagesize()
    limit, hard = used + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
