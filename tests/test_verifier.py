"""Scorers, one by one and then in worker processes that hang, crash and are killed.

The workers of these tests import SCORERS from this very module.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from reasoning_gym import create_dataset

from megatron_fec.tasks import scorers, verifier, verifier_worker
from megatron_fec.tasks.arithmetic import countdown_rows, demonstrations
from megatron_fec.tasks.scorers import (
    last_box,
    score_countdown,
    score_math,
    score_reasoning_gym,
    to_json,
)
from megatron_fec.tasks.verifier import Verifier
from megatron_fec.types import Prompt, Sample, SampleGroup

TIMEOUT = 2.0
MAX_PID = 1 << 22


def loop_for_ever(response: str, answer: str, extra: str) -> float:
    while True:
        pass


SCORERS = {
    "length": lambda response, answer, extra: len(response) / 100,
    "hang": loop_for_ever,
    "exit": lambda response, answer, extra: os._exit(3),
    "abort": lambda response, answer, extra: os.abort(),
    "raise": lambda response, answer, extra: 1 / 0,
    "memory": lambda response, answer, extra: float(len(bytearray(2 * verifier_worker.MEMORY_BYTES))),
    "print": lambda response, answer, extra: float(print("noise on stdout") is None),
    "torch": lambda response, answer, extra: float("torch" in sys.modules or "transformers" in sys.modules),
    "pid": lambda response, answer, extra: os.getpid() / MAX_PID,
}


def group(name: str, *texts: str, answer: str = "", extra: str = "") -> SampleGroup:
    prompt = Prompt(prompt_id=0, text="", token_ids=(), answer=answer, verifier=name, extra=extra)
    samples = [
        Sample(token_ids=(), logprobs=(), text=text, is_truncated=False, weight_version=0) for text in texts
    ]
    return SampleGroup(prompt=prompt, samples=tuple(samples))


@pytest.fixture(scope="module")
def odd_pool() -> Iterator[Verifier]:
    """One worker, so that whatever follows a crash comes from its successor."""
    pool = Verifier(1, TIMEOUT, scorers=__name__)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[Verifier]:
    pool = Verifier(2, 3 * TIMEOUT)
    yield pool
    pool.close()


def score(pool: Verifier, *groups: SampleGroup) -> verifier.VerifierResult:
    return pool.finish_step(pool.start_step(groups))


def pid_of(pool: Verifier) -> int:
    """The worker of a pool of one."""
    return int(score(pool, group("pid", "")).rewards[0][0] * MAX_PID)


# ------------------------------------------------------------------ scorers


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and \boxed{cut o", "7"),
        (r"\boxed{}", ""),
        ("none", None),
    ],
)
def test_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"so \boxed{34}", "34", 1),
        (r"so \boxed{35}", "34", 0),
        (r"\boxed{34}, no, \boxed{35}", "34", 0),
        (r"\boxed{35}, no, \boxed{34}", "34", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{\dfrac{2}{4}}", r"\frac{1}{2}", 1),
        (r"\boxed{1,234}", "1234", 1),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1),
        ("The answer is $34$.", "34", 1),
        ("The answer is 34", "34", 1),
        ("The answer is 33", "34", 0),
        ("", "34", 0),
        ("I do not know", "34", 0),
    ],
)
def test_score_math(response: str, answer: str, reward: float) -> None:
    assert score_math(response, answer, "") == reward


def test_an_answer_that_math_verify_cannot_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="the answer ' ' is not LaTeX"):
        score_math(r"\boxed{34}", " ", "")


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("so well 3 * now ah 4 + um so 5", 1),
        ("4 * 3 + 5", 1),
        ("5 + 3 * 4", 1),  # 32 from left to right
        ("3 + 4 * 5", 0),  # 23; 35 from left to right
        ("3 * 4 + 6", 0),
        ("3 * 5 + 2", 0),  # 17, from other numbers
        ("3 * 4 + 5 + 5 - 5", 0),  # numbers used twice
        ("3 * 4 5", 0),
        ("3 * 4 + 5 = 17", 0),
        ("17", 0),
        ("", 0),
        ("foreign 3 * 4 + 5", 0),
    ],
)
def test_score_countdown(response: str, reward: float) -> None:
    assert score_countdown(response, "17", json.dumps({"numbers": [3, 4, 5]})) == reward


def test_math_verify_agrees_with_every_demonstration() -> None:
    train = {row["prompt"][0]["content"]: row for row in countdown_rows("train")}
    for prompt, response in demonstrations(300, seed=5):
        row = train[prompt]
        target, extra = int(row["reward_model"]["ground_truth"]), json.dumps(row["extra_info"])
        assert score_countdown(response, str(target), extra) == 1
        assert score_countdown(response, str(target + 1), extra) == 0


def test_verdicts_on_the_same_expression_are_cached() -> None:
    extra = json.dumps({"numbers": [3, 4, 5]})
    score_countdown("so 3 * 4 + 5", "17", extra)
    hits = scorers._equal_arithmetic.cache_info().hits
    score_countdown("well 3 * um 4 + oh 5", "17", extra)
    assert scorers._equal_arithmetic.cache_info().hits == hits + 1


@pytest.mark.parametrize("name", ["leg_counting", "rearc"])  # rearc compares tuples, which plain JSON loses
def test_score_reasoning_gym(name: str) -> None:
    entry = create_dataset(name, size=1, seed=3)[0]
    extra = to_json({"dataset": name, "entry": entry})
    assert score_reasoning_gym(entry["answer"], entry["answer"], extra) == 1
    assert score_reasoning_gym(f"I think \\boxed{{{entry['answer']}}}", entry["answer"], extra) == 1
    assert score_reasoning_gym("\\boxed{nonsense}", entry["answer"], extra) < 0.1


def test_score_reasoning_gym_reads_plain_json() -> None:
    entry = create_dataset("leg_counting", size=1, seed=3)[0]
    assert (
        score_reasoning_gym(entry["answer"], "", json.dumps({"dataset": "leg_counting", "entry": entry})) == 1
    )


def test_json_keeps_tuples_and_keys() -> None:
    value = {"a": (1, [2, (3,)]), "b": {0: "x", (1, 2): None}, "c": [{}, 1.5, True]}
    assert json.loads(to_json(value), object_hook=scorers._restore) == value


# ------------------------------------------------------------------ worker processes


def test_rewards_come_back_in_order(pool: Verifier) -> None:
    extra = json.dumps({"numbers": [3, 4, 5]})
    result = score(
        pool,
        group("math", r"\boxed{34}", r"\boxed{1}", "34", answer="34"),
        group("countdown", "3 * 4 + 5", "3 + 4 + 5", answer="17", extra=extra),
    )
    assert result == verifier.VerifierResult(rewards=[[1, 0, 1], [1, 0]], timeouts=0, crashes=0)


def test_a_step_without_groups_is_empty(pool: Verifier) -> None:
    assert score(pool) == verifier.VerifierResult(rewards=[], timeouts=0, crashes=0)


def test_two_steps_may_overlap(pool: Verifier) -> None:
    first, second = (pool.start_step([group("math", *["34", "35"] * 9, answer=a)]) for a in ("34", "35"))
    assert pool.finish_step(second).rewards == [[0, 1] * 9]
    assert pool.finish_step(first).rewards == [[1, 0] * 9]


def test_a_power_tower_times_out_and_the_queue_goes_on(pool: Verifier) -> None:
    tower = r"\boxed{9^{9^{9}}}"
    result = score(pool, group("math", tower, *["34"] * 6, answer="34"))
    assert result == verifier.VerifierResult(rewards=[[0.0] + [1.0] * 6], timeouts=1, crashes=0)


@pytest.mark.parametrize(
    ("name", "timeouts", "crashes"),
    [("hang", 1, 0), ("exit", 0, 1), ("abort", 0, 1), ("raise", 0, 1), ("memory", 0, 1)],
)
def test_one_bad_response_costs_its_own_reward_only(
    odd_pool: Verifier, name: str, timeouts: int, crashes: int
) -> None:
    result = score(odd_pool, group("length", "a"), group(name, "bad"), group("length", "ab", "abc"))
    assert result == verifier.VerifierResult(
        rewards=[[0.01], [0], [0.02, 0.03]], timeouts=timeouts, crashes=crashes
    )


def test_several_bad_responses_are_counted(odd_pool: Verifier) -> None:
    result = score(odd_pool, group("exit", "a", "b"), group("hang", "c"), group("length", "abcd"))
    assert result == verifier.VerifierResult(rewards=[[0, 0], [0], [0.04]], timeouts=1, crashes=2)


def test_a_worker_killed_while_idle_costs_nothing(odd_pool: Verifier) -> None:
    pid = pid_of(odd_pool)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is gone, and still for the pool to find
    result = score(odd_pool, group("length", "a", "ab"), group("pid", ""))
    assert result.rewards[0] == [0.01, 0.02] and result.crashes == 0
    assert result.rewards[1] != [pid / MAX_PID]


def test_workers_stay_warm(odd_pool: Verifier) -> None:
    pids = {reward for _ in range(3) for reward in score(odd_pool, group("pid", "", "")).rewards[0]}
    assert len(pids) == 1


def test_start_step_does_not_wait(odd_pool: Verifier) -> None:
    handle = odd_pool.start_step([group("hang", "")])
    assert not handle[0][0].done()
    assert odd_pool.finish_step(handle).timeouts == 1


def test_workers_do_not_import_torch(odd_pool: Verifier) -> None:
    assert score(odd_pool, group("torch", "")).rewards == [[0]]


def test_prints_do_not_disturb_the_protocol(odd_pool: Verifier) -> None:
    assert score(odd_pool, group("print", ""), group("length", "\ud800 \n x")).rewards == [[1], [0.05]]


def test_an_unknown_verifier_is_refused(pool: Verifier) -> None:
    with pytest.raises(
        ValueError, match=r"verifier 'maths' is unknown. Use one of countdown, math, reasoning_gym"
    ):
        pool.start_step([group("maths", "34")])


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_in_pytest.py").write_text(
        "import sys\nassert 'pytest' in sys.modules\nSCORERS = {'x': float}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    broken = Verifier(1, TIMEOUT, scorers="only_in_pytest")
    with pytest.raises(RuntimeError, match=r"a verifier worker did not start .exit status 1.*should work"):
        score(broken, group("x", "1"))
    broken.close()


def test_close_ends_the_workers() -> None:
    pool = Verifier(2, TIMEOUT, scorers=__name__)
    pids = {reward * MAX_PID for reward in score(pool, group("pid", *[""] * 20)).rewards[0]}
    pool.close()
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
