"""Scorers that misbehave, for workers to import from this module, and how the tests ask a pool."""

from __future__ import annotations

import contextlib
import json
import os
import signal

from megatron_fec.tasks.verifier import ANSWER_BYTES, Verdict, Verifier
from megatron_fec.types import Prompt, Sample, SampleGroup

TIMEOUT = 2.0
MAX_PID = 1 << 22
MILLION = 1_000_000
CRASH, HANG = Verdict(0.0, is_crash=True), Verdict(0.0, is_timeout=True)


def hang_without_signals(response: str, answer: str, extra: str) -> float:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        pass


def babble(response: str, answer: str, extra: str) -> float:
    """Writes the response into whatever is open, the socket included, and then gives a reward."""
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, response.encode())
    return 1.0


def flood(response: str, answer: str, extra: str) -> float:
    while True:
        babble("x" * ANSWER_BYTES, answer, extra)


def close_all(response: str, answer: str, extra: str) -> float:
    os.closerange(3, 64)
    while True:
        pass


def evaluate(response: str, answer: str, extra: str) -> float:
    """As reasoning-gym does: the response is Python, and whatever it raises is caught."""
    with contextlib.suppress(Exception):
        return float(eval(response))
    return 1.0


def fill_memory_slowly(response: str, answer: str, extra: str) -> float:
    held = []
    while True:
        held.append(bytes(1 << 29))  # not touched, so it costs no time


def nest(response: str, answer: str, extra: str) -> float:
    return nest(response, answer, extra)


SCORERS = {
    "hang": hang_without_signals,
    "babble": babble,
    "flood": flood,
    "close": close_all,
    "evaluate": evaluate,
    "memory": fill_memory_slowly,
    "nest": nest,
    "stop": lambda response, answer, extra: float(signal.raise_signal(signal.SIGSTOP) is None),
    "return": lambda response, answer, extra: json.loads(response),
    "pid": lambda response, answer, extra: os.getpid() / MAX_PID,
    "length": lambda response, answer, extra: len(response) / (16 * MILLION),
    "environment": lambda response, answer, extra: float(os.environ.get(response) == answer),
    "good": lambda response, answer, extra: 1.0,
}


def group(name: str, *texts: str, answer: str = "", extra: str = "") -> SampleGroup:
    prompt = Prompt(prompt_id=0, text="", token_ids=(), answer=answer, verifier=name, extra=extra)
    samples = [
        Sample(token_ids=(), logprobs=(), text=text, is_truncated=False, weight_version=0) for text in texts
    ]
    return SampleGroup(prompt=prompt, samples=tuple(samples))


def verdicts(pool: Verifier, *groups: SampleGroup) -> list[list[Verdict]]:
    return [[future.result() for future in futures] for futures in pool.start_step(groups)]


def verdict(pool: Verifier, name: str, text: str = "", *, answer: str = "", extra: str = "") -> Verdict:
    return verdicts(pool, group(name, text, answer=answer, extra=extra))[0][0]


def pid_of(pool: Verifier) -> int:
    """The worker of a pool of one."""
    return int(verdict(pool, "pid").reward * MAX_PID)
