"""What a response may do in a worker, and how long it and its answer may be."""

import contextlib
import os
import random
import resource
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS
from verifier_fixtures import CRASH, MILLION, TIMEOUT, group, pid_of, verdict, verdicts

from megatron_fec.tasks import scorers
from megatron_fec.tasks.scorers import LONGEST, score_math, score_reasoning_gym, to_json
from megatron_fec.tasks.verifier import Verdict, Verifier
from megatron_fec.tasks.verifier_worker import MEMORY_BYTES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[Verifier]:
    """One worker, so that whatever follows a fault comes from it or its successor."""
    pool = Verifier(1, TIMEOUT, scorers="verifier_fixtures")
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=[3.0])
def real_pool(request: pytest.FixtureRequest) -> Iterator[Verifier]:
    """With the scorers of training."""
    pool = Verifier(1, request.param)
    yield pool
    pool.close()


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
    own = Verifier(1, TIMEOUT, scorers="verifier_fixtures")
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
