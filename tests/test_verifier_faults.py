"""The verifier under faults that really happen: workers that babble, stop, are killed or reach out, and texts that are huge.

The workers of these tests import SCORERS from this very module.
"""

import contextlib
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS

from megatron_fec.tasks import scorers, verifier
from megatron_fec.tasks.scorers import LONGEST, score_math, score_reasoning_gym, to_json
from megatron_fec.tasks.verifier import ANSWER_BYTES, Verdict, Verifier, VerifierResult
from megatron_fec.tasks.verifier_worker import MEMORY_BYTES
from megatron_fec.types import Prompt, Sample, SampleGroup

pytestmark = pytest.mark.slow

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


def assert_gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture(scope="module")
def pool() -> Iterator[Verifier]:
    """One worker, so that whatever follows a fault comes from it or its successor."""
    pool = Verifier(1, TIMEOUT, scorers=__name__)
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=[3.0])
def real_pool(request: pytest.FixtureRequest) -> Iterator[Verifier]:
    """With the scorers of training."""
    pool = Verifier(1, request.param)
    yield pool
    pool.close()


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


def test_an_answer_without_an_end_is_a_timeout(pool: Verifier) -> None:
    """Bytes that come in before the deadline do not move it."""
    ours, theirs = socket.socketpair()
    worker = pool._idle.get()
    stolen, worker._socket = worker._socket, ours
    pool._idle.put(worker)
    handle = pool.start_step([group("good", "")])
    number = json.loads(theirs.recv(4096))[0]
    theirs.sendall(f'{{"number": {number}, "reward": '.encode())
    assert handle[0][0].result() == HANG
    stolen.close()
    theirs.close()
    assert verdict(pool, "good") == Verdict(1.0)


@pytest.mark.parametrize("reward", ["NaN", "7", "-1", '"1"', "null", "1" + "0" * 400, "[]"])
def test_an_answer_with_no_reward_is_a_crash(pool: Verifier, reward: str) -> None:
    """A reward that is none comes from no worker of ours, so another process answers in its place."""
    ours, theirs = socket.socketpair()
    worker = pool._idle.get()
    stolen, worker._socket = worker._socket, ours
    pool._idle.put(worker)
    handle = pool.start_step([group("good", "")])
    number = json.loads(theirs.recv(4096))[0]
    theirs.sendall(f'{{"number": {number}, "reward": {reward}}}\n'.encode())
    assert handle[0][0].result() == CRASH
    stolen.close()
    theirs.close()
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
from {__name__} import *
pool = Verifier(1, 600.0, scorers={__name__!r})
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


# ------------------------------------------------------------------ what a worker may do


@pytest.mark.parametrize(
    "attempt",
    [
        "open('{canary}', 'w').write('x')",
        "__import__('os').open('{canary}', 65)",
        "open('{secret}').read()",
        "open('/proc/self/environ').read()",
        "open('/proc/' + str(__import__('os').getppid()) + '/environ').read()",
        "__import__('os').system('touch {canary}')",
        "__import__('subprocess').run(['touch', '{canary}'])",
        "__import__('os').fork()",
        "__import__('os').posix_spawn('/bin/true', ['true'], {{}})",
        "__import__('os').execv('/bin/true', ['true'])",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "__import__('os').remove('{secret}')",
        "__import__('os').rename('{secret}', '{canary}')",
        "__import__('os').chmod('{secret}', 0)",
        "__import__('os').symlink('{secret}', '{canary}')",
        "__import__('os').mkdir('{canary}')",
        "__import__('shutil').rmtree('{secret}')",
        "__import__('socket').socket().connect(('127.0.0.1', {port}))",
        "__import__('urllib.request').request.urlopen('http://127.0.0.1:{port}')",
        "__import__('ctypes').CDLL(None).getpid()",
    ],
)
def test_what_a_response_must_not_do(
    pool: Verifier, attempt: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scorers that evaluate text exist, and swallow what it raises: the attempt is named, and earns nothing."""
    canary, secret = tmp_path / "canary", tmp_path / "secret"
    secret.write_text("geheim")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert verdict(pool, "evaluate", attempt.format(canary=canary, secret=secret, port=port)) == CRASH
        assert select.select([server], [], [], 0)[0] == []  # nobody came
    assert "an attempt that is not allowed: " in caplog.text
    assert not os.path.lexists(canary)
    assert secret.read_text() == "geheim"
    assert "geheim" not in caplog.text
    assert verdict(pool, "good") == Verdict(1.0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1 + 0", Verdict(1.0)), ("__import__('sympy').Integer(1)", Verdict(1.0)), ("exit()", CRASH)],
)
def test_what_a_response_may_do(pool: Verifier, text: str, wanted: Verdict) -> None:
    before = pid_of(pool)
    assert verdict(pool, "evaluate", text) == wanted
    assert pid_of(pool) == before


def limits_of(pid: int) -> dict[str, tuple[int, int]]:
    kinds = ("FSIZE", "CORE", "NPROC", "AS", "CPU")
    return {kind: resource.prlimit(pid, getattr(resource, f"RLIMIT_{kind}")) for kind in kinds}


def test_the_kernel_limits_a_worker(pool: Verifier) -> None:
    limits = limits_of(pid_of(pool))
    assert (limits["FSIZE"], limits["CORE"], limits["NPROC"]) == ((0, 0), (0, 0), (0, 0))
    soft, hard = limits["AS"]
    assert MEMORY_BYTES <= soft == hard < 16 << 30
    assert 2 * TIMEOUT < limits["CPU"][0] < 600


def test_a_worker_sees_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setenv("FEC_PLAIN", "plain")
    own = Verifier(1, TIMEOUT, scorers=__name__)
    assert verdict(own, "environment", "FEC_PLAIN", answer="plain") == Verdict(1.0)
    assert verdict(own, "environment", "HF_TOKEN", answer="hf_planted") == Verdict(0.0)
    own.close()


@pytest.mark.parametrize("real_pool", [30.0], indirect=True)
def test_the_limits_change_no_verdict(real_pool: Verifier) -> None:
    """Each data set of reasoning-gym that can be made: its scorer gives in a worker what it gives here."""
    names, wanted, futures = [], [], []
    for name in sorted(DATASETS):
        random.seed(0)
        with contextlib.suppress(Exception):  # composite, for example, needs settings
            entry = create_dataset(name, size=1, seed=3)[0]
            extra, text = to_json({"dataset": name, "entry": entry}), str(entry["answer"])
            wanted.append(Verdict(score_reasoning_gym(text, "", extra)))
            names.append(name)
            futures += real_pool.start_step([group("reasoning_gym", text, extra=extra)])[0]
    found = [future.result() for future in futures]
    assert [(n, f, w) for n, f, w in zip(names, found, wanted, strict=True) if f != w] == []
    assert len(names) > 90 and sum(one.reward == 1 for one in found) > 90


# ------------------------------------------------------------------ huge and odd texts


@pytest.mark.parametrize(
    "text",
    [
        "x" * MILLION,
        "\\boxed{" * (MILLION // 7),
        "{" * MILLION,
        "}" * MILLION,
        "\\boxed{" + "{" * MILLION + "}" * MILLION + "}",
        "\\boxed{" + "1" * MILLION + "}",
        "\\" * MILLION,
        "$" * MILLION,
        "\x00" * MILLION,
        "\ud800" * MILLION,
        "\u202e\u0661" * (MILLION // 2),
        "final answer is " * (MILLION // 16),
        "(" * MILLION,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_a_million_characters(real_pool: Verifier, text: str) -> None:
    """A verdict without a reward, whatever way it takes; the next response finds a worker."""
    one, other = verdicts(real_pool, group("math", text, f"{text} \\boxed{{34}}", answer="34"))[0]
    assert one.reward == 0
    assert other.reward == 1 or other.is_timeout or other.is_crash
    assert verdict(real_pool, "math", "\\boxed{34}", answer="34") == Verdict(1.0)


@pytest.mark.parametrize("answer", ["x" * MILLION, "\\frac{" * MILLION, "1" * MILLION, "\x00"])
def test_a_million_characters_of_answer(real_pool: Verifier, answer: str) -> None:
    assert verdict(real_pool, "math", "\\boxed{34}", answer=answer).reward == 0
    assert verdict(real_pool, "math", "\\boxed{34}", answer="34") == Verdict(1.0)


def test_the_last_box_of_a_long_response_counts() -> None:
    long = "so we see that $x = 1$ and { so on. " * (3 * LONGEST // 36)
    assert score_math(f"{long}\\boxed{{34}}", "34", "") == 1
    assert score_math(f"\\boxed{{34}}{long}", "34", "") == 1
    assert score_math(f"\\boxed{{34}}{long}\\boxed{{35}}", "34", "") == 0


def test_a_long_response_without_a_box_is_read_from_its_end() -> None:
    filler = "and so on " * (LONGEST // 10)
    assert score_math(f"The answer is 34. {filler[: LONGEST // 2]}", "34", "") == 1
    assert score_math(f"The answer is 34. {filler} {filler}", "34", "") == 0
    assert score_math(f"{filler} {filler} The answer is 34", "34", "") == 1


def test_a_box_longer_than_any_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert score_math("\\boxed{" + " " * (LONGEST - 2) + "34}", "34", "") == 1
    monkeypatch.setattr(scorers, "parse", None)  # nothing is parsed
    assert score_math("\\boxed{" + " " * (LONGEST - 1) + "34}", "34", "") == 0
    extra = to_json({"dataset": "leg_counting", "entry": {"answer": "34"}})
    assert score_reasoning_gym("4" * (LONGEST + 1), "", extra) == 0


def test_long_texts_do_not_stay_in_the_caches() -> None:
    before = scorers._equal_latex.cache_info().currsize
    score_math("\\boxed{" + "1+" * 600 + "1}", "34", "")
    score_math("no box, 35", "34", "")
    assert scorers._equal_latex.cache_info().currsize == before
