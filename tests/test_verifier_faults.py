"""Verifier workers that babble, hang, stop and are killed, and parents that are: one response is lost, no more."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from verifier_fixtures import CRASH, HANG, MILLION, TIMEOUT, group, pid_of, verdict

from megatron_fec.tasks import verifier
from megatron_fec.tasks.verifier import ANSWER_BYTES, Verdict, Verifier, VerifierResult

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[Verifier]:
    """One worker, so that whatever follows a fault comes from it or its successor."""
    pool = Verifier(1, TIMEOUT, scorers="verifier_fixtures")
    yield pool
    pool.close()


def assert_gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# ------------------------------------------------------------------ what a worker may answer


@pytest.mark.parametrize(
    "reward", ["NaN", "Infinity", "-0.1", "1.5", "1e999", '"1"', "null", "[1]", "{}", "-1"]
)
def test_a_scorer_that_gives_no_reward_is_a_crash(pool: Verifier, reward: str) -> None:
    before = pid_of(pool)
    wanted = CRASH if reward != '"1"' else Verdict(1.0)  # float() reads a text
    assert verdict(pool, "return", reward) == wanted
    assert pid_of(pool) == before  # the worker is sound


@pytest.mark.parametrize(
    "garbage",
    [
        "garbage\n",
        '{"reward": 1}\n',  # not to this request, and its own true answer follows
        '{"number": 0, "reward": 1}\n',
        "[]\n",
        "7\n",
        "[" * (ANSWER_BYTES - 1) + "\n",
        "\x00\x7f\n",
        "x" * (2 * ANSWER_BYTES),
    ],
)
def test_a_worker_that_writes_garbage_is_replaced(pool: Verifier, garbage: str) -> None:
    before = pid_of(pool)
    assert verdict(pool, "babble", garbage) == CRASH
    assert verdict(pool, "good") == Verdict(1.0)
    assert pid_of(pool) != before
    assert_gone(before)


def answered_by_another(pool: Verifier, answer: str) -> Verdict:
    """What the pool makes of the answer of a process in a worker's place; {} is the number of the question."""
    ours, theirs = socket.socketpair()
    worker = pool._idle.get()
    stolen, worker._socket = worker._socket, ours
    pool._idle.put(worker)
    handle = pool.start_step([group("good", "")])
    number = json.loads(theirs.recv(4096))[0]
    theirs.sendall(answer.format(number).encode())
    found = handle[0][0].result()
    stolen.close()
    theirs.close()
    return found


def test_an_answer_without_an_end_is_a_timeout(pool: Verifier) -> None:
    """Bytes that come in before the deadline do not move it."""
    assert answered_by_another(pool, '{{"number": {}, "reward": ') == HANG
    assert verdict(pool, "good") == Verdict(1.0)


@pytest.mark.parametrize("reward", ["NaN", "7", "-1", '"1"', "null", "1" + "0" * 400, "[]"])
def test_an_answer_with_no_reward_is_a_crash(pool: Verifier, reward: str) -> None:
    """A reward that is none comes from no worker of ours, so another process answers in its place."""
    assert answered_by_another(pool, '{{"number": {}, "reward": ' + reward + "}}\n") == CRASH
    assert verdict(pool, "good") == Verdict(1.0)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("hang", HANG), ("stop", HANG), ("close", CRASH), ("memory", CRASH), ("flood", CRASH)],
)
def test_a_worker_that_is_lost_is_replaced(pool: Verifier, name: str, wanted: Verdict) -> None:
    before = pid_of(pool)
    assert verdict(pool, name) == wanted
    assert verdict(pool, "good") == Verdict(1.0)
    assert_gone(before)


def test_endless_recursion_costs_no_worker(pool: Verifier) -> None:
    before = pid_of(pool)
    assert verdict(pool, "nest") == CRASH
    assert pid_of(pool) == before


# ------------------------------------------------------------------ killed and orphaned


def state_of(pid: int) -> str:
    """R runs, S sleeps, T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_killed_while_it_works_costs_one_response(pool: Verifier) -> None:
    pid = pid_of(pool)
    handle = pool.start_step([group("hang", ""), group("good", "", "")])
    while state_of(pid) != "R":  # asleep until the request has come, and from then on it runs
        pass
    os.kill(pid, signal.SIGKILL)
    assert pool.finish_step(handle) == VerifierResult(rewards=[[0], [1, 1]], timeouts=0, crashes=1)
    assert_gone(pid)


def test_a_worker_that_is_stopped_while_idle_takes_no_request(pool: Verifier) -> None:
    """More than a socket holds: sending blocks, and the deadline holds there too."""
    pid = pid_of(pool)
    os.kill(pid, signal.SIGSTOP)
    while state_of(pid) != "T":
        pass
    assert verdict(pool, "length", "x" * 8 * MILLION) == HANG
    assert verdict(pool, "length", "x" * 8 * MILLION) == Verdict(0.5)
    assert_gone(pid)


@pytest.mark.parametrize("task", ["hang", "good"])
def test_a_killed_parent_leaves_no_worker(task: str) -> None:
    """SIGKILL of the parent, with a worker that blocks all signals and hangs, or one that is idle."""
    code = f"""
import sys; sys.path[:] = {sys.path!r}
from verifier_fixtures import *
pool = Verifier(1, 600.0, scorers='verifier_fixtures')
print(pid_of(pool), flush=True)
handle = pool.start_step([group({task!r}, "")])
print("begun" if {task!r} == "hang" else handle[0][0].result(), flush=True)
handle[0][0].result()
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        handle = os.pidfd_open(worker)
        parent.stdout.readline()
        while task == "hang" and state_of(worker) != "R":
            pass
        parent.kill()
        assert select.select([handle], [], [], 30)[0], "the worker outlived its parent"
        os.close(handle)


def test_a_worker_that_is_left_alone_ends_by_itself() -> None:
    """Where no parent kills it: at the end of the stream when idle, by its alarm when it hangs."""
    idle, hanging = (verifier._Worker("test_verifier", 0.1) for _ in range(2))
    for worker in (idle, hanging):
        worker._await_ready()
    idle._socket.close()
    assert idle._process.wait(timeout=30) == 0
    hanging._socket.sendall(json.dumps([1, "hang", "", "", ""]).encode() + b"\n")
    assert hanging._process.wait(timeout=30) == -signal.SIGALRM
    hanging.kill()
