"""Generations on disk: what is read back, what is refused and how, and the tables made of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_fec.config import ConfigError
from megatron_fec.evaluation_config import load_evaluation
from megatron_fec.evaluation_files import (
    DIGEST_BYTES,
    Generation,
    append_generations,
    check_made_with,
    digest_of_prompts,
    digest_of_weights,
    generations_of,
    keep_generations,
    read_generations,
)
from megatron_fec.evaluation_results import result_of, terminal_table, write_results
from megatron_fec.tasks.verifier import Verdict
from megatron_fec.types import Prompt, Sample, SampleGroup

TINY = Path(__file__).resolve().parent.parent / "configs" / "evaluation_tiny.yaml"
SAMPLES, SEEDS = 2, [100, 200, 300]
PROMPTS = [
    Prompt(prompt_id=i, text=f"p{i}", token_ids=(i,), answer=str(i), verifier="math") for i in range(3)
]


def sample(number: int, *, is_truncated: bool = False) -> Sample:
    return Sample(
        token_ids=tuple(range(number + 1)),
        logprobs=(0.0,) * (number + 1),
        text=f"r{number}",
        is_truncated=is_truncated,
        weight_version=0,
    )


def lines(count: int = 6) -> list[Generation]:
    groups = [
        SampleGroup(prompt=prompt, samples=(sample(0, is_truncated=True), sample(prompt.prompt_id)))
        for prompt in PROMPTS
    ]
    verdicts = [[Verdict(1.0), Verdict(0.0)], [Verdict(0.0, is_timeout=True), Verdict(0.5)]]
    verdicts += [[Verdict(0.0, is_crash=True), Verdict(0.0)]]
    return generations_of(groups, verdicts, SEEDS)[:count]


def read(path: Path) -> list[Generation]:
    return read_generations(path, PROMPTS, samples=SAMPLES, seeds=SEEDS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "generations" / "one.jsonl"


# ------------------------------------------------------------------ generations


def test_a_line_holds_all_of_a_response():
    assert asdict(lines()[2]) == {
        "prompt_id": 1,
        "sample": 0,
        "text": "p1",
        "answer": "1",
        "response": "r0",
        "tokens": 1,
        "reward": 0.0,
        "verdict": "timeout",
        "truncated": True,
        "finish": "length",
        "seed": 200,
    }
    last = lines()[3]
    assert (last.sample, last.tokens, last.reward, last.verdict, last.finish, last.seed) == (
        1,
        2,
        0.5,
        "scored",
        "stop",
        201,
    )
    assert lines()[4].verdict == "crash"


def test_what_is_written_in_pieces_is_read_back(path: Path):
    path.parent.parent.mkdir(exist_ok=True)
    assert read(path) == []
    append_generations(path, lines()[:2])
    append_generations(path, [replace(lines()[2], response='two\nlines \u2028 and "quotes"')])
    assert read(path)[:2] == lines(2)
    assert read(path)[2].response == 'two\nlines \u2028 and "quotes"'


def test_a_half_written_last_line_is_dropped(path: Path):
    append_generations(path, lines(3))
    path.write_bytes(path.read_bytes()[:-5])
    assert read(path) == lines(2)
    keep_generations(path, 2)
    append_generations(path, lines()[2:])
    assert read(path) == lines()


def test_keeping_fewer_lines_cuts_the_file(path: Path):
    keep_generations(path, 0)  # no file, nothing to do
    append_generations(path, lines())
    keep_generations(path, 4)
    assert read(path) == lines(4)
    keep_generations(path, 0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (2, b"{half\n", r"one\.jsonl line 2 is not a generation of this evaluation: Expecting property name"),
        (4, b"\xff\n", r"line 4 is not a generation of this evaluation: .*utf-8"),
        (1, b"[1]\n", r"line 1 .*: it must be an object with the keys prompt_id, sample, text"),
        (3, {"extra": 1}, r"line 3 .*: it must be an object with the keys prompt_id"),
        (
            3,
            {"reward": "1"},
            r"line 3 .*: reward must be float, not '1'\. Cut the file before that line to sample anew",
        ),
        (3, {"truncated": 1}, r"line 3 .*: truncated must be bool, not 1"),
        (3, {"tokens": True}, r"line 3 .*: tokens must be int, not True"),
        (3, {"sample": 1}, r"line 3 .*: it is of prompt_id 1, sample 1, not of \(1, 0\)"),
        (3, {"prompt_id": 2}, r"line 3 .*: it is of prompt_id 2, sample 0, not of \(1, 0\)"),
        (3, {"seed": 5}, r"line 3 .*: its seed is 5, not 200"),
    ],
)
def test_a_corrupt_line_is_named(path: Path, line: int, change: Any, message: str):
    append_generations(path, lines())
    rows = path.read_bytes().splitlines(keepends=True)
    if isinstance(change, dict):
        change = json.dumps(json.loads(rows[line - 1]) | change).encode() + b"\n"
    path.write_bytes(b"".join([*rows[: line - 1], change, *rows[line:]]))
    with pytest.raises(ConfigError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_one_line_too_many(path: Path):
    append_generations(path, [*lines(), replace(lines()[0], prompt_id=3, seed=400)])
    with pytest.raises(ConfigError, match=r"line 7 .*: the 3 problems have 6 responses"):
        read(path)


# ------------------------------------------------------------------ what they were made with


def made_with(**changes: Any) -> dict[str, Any]:
    """changes: a dotted key, dots as __."""
    tree: dict[str, Any] = {
        "model": {"path": "m", "digest": "d"},
        "rollout": {"temperature": 0.7, "top_k": 20},
        "benchmarks": {"one": {"samples": 4, "problems": 9, "prompts": "a"}},
    }
    for key, value in changes.items():
        *parts, last = key.split("__")
        node = tree
        for part in parts:
            node = node[part]
        node[last] = value
    return tree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__digest": "e", "model__path": "n"},
            r"of other weights \(model\.path=m\) than model\.path=n\.",
        ),
        ({"rollout__temperature": 1.0}, r"made with rollout\.temperature=0\.7, not 1\.0\."),
        ({"rollout__new": 1}, r"made with rollout\.new=None, not 1\."),
        ({"benchmarks__one__samples": 8}, r"made with benchmarks\.one\.samples=4, not 8\."),
        ({"benchmarks__one__prompts": "b"}, r"of other prompts than benchmarks\.one has now"),
        ({"benchmarks__one__problems": 10}, r"of other prompts than benchmarks\.one has now"),
    ],
)
def test_a_folder_of_another_evaluation(tmp_path: Path, changes: dict[str, Any], message: str):
    check_made_with(tmp_path, made_with())
    check_made_with(tmp_path, made_with())
    with pytest.raises(
        ConfigError, match=rf"output_dir=.* holds an evaluation {message}.*Use another output_dir"
    ):
        check_made_with(tmp_path, made_with(**changes))
    check_made_with(tmp_path, made_with(model__path="moved"))  # the same weights


def test_benchmarks_may_come_one_after_another(tmp_path: Path):
    check_made_with(tmp_path, made_with())
    two = made_with(benchmarks={"two": {"samples": 1, "problems": 2, "prompts": "b"}})
    check_made_with(tmp_path, two)
    with pytest.raises(ConfigError, match=r"benchmarks\.one\.samples=4, not 8"):
        check_made_with(tmp_path, made_with(benchmarks__one__samples=8))
    two["benchmarks"]["two"]["samples"] = 3
    with pytest.raises(ConfigError, match=r"benchmarks\.two\.samples=1, not 3"):
        check_made_with(tmp_path, two)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_notes_that_cannot_be_read(tmp_path: Path, text: str):
    (tmp_path / "made_with.json").write_text(text)
    with pytest.raises(ConfigError, match=r"made_with\.json is not readable \(.*\)\. Use another output_dir"):
        check_made_with(tmp_path, made_with())


def test_generations_without_notes(tmp_path: Path):
    (tmp_path / "generations").mkdir()
    with pytest.raises(
        ConfigError, match=r"holds generations, but no made_with\.json\. Use another output_dir"
    ):
        check_made_with(tmp_path, made_with())


def test_the_digest_sees_other_weights_and_not_another_place(tmp_path: Path):
    size = 200 * DIGEST_BYTES

    def model(name: str, *, weights: bytes, config: str = "{}") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        (folder / "model.safetensors").write_bytes(weights)
        return folder

    zeros = model("a", weights=bytes(size))
    assert digest_of_weights(zeros) == digest_of_weights(model("b", weights=bytes(size)))
    others = [
        model("c", weights=bytes(size + 1)),
        model("d", weights=bytes(size - 1) + b"x"),
        model("e", weights=b"x" + bytes(size - 1)),
        model(
            "f", weights=bytes(size // 2) + b"x" * (4 * DIGEST_BYTES) + bytes(size // 2 - 4 * DIGEST_BYTES)
        ),
        model("g", weights=bytes(size), config='{"a": 1}'),
        model("h", weights=b"x"),
    ]
    assert len({digest_of_weights(folder) for folder in [zeros, *others]}) == 7


def test_the_digest_of_prompts_sees_what_engine_and_verifier_see():
    changes: list[dict[str, Any]] = [
        {},
        {"token_ids": (9,)},
        {"answer": "x"},
        {"verifier": "countdown"},
        {"extra": "{}"},
    ]
    found = {digest_of_prompts([replace(PROMPTS[0], **change), PROMPTS[1]]) for change in changes}
    assert len(found) == 5
    assert digest_of_prompts(PROMPTS) != digest_of_prompts(PROMPTS[::-1])


# ------------------------------------------------------------------ results


def test_results_by_hand(tmp_path: Path):
    config = load_evaluation(TINY)
    one = result_of("one", lines(), samples=SAMPLES, ks=[1, 2], num_too_long=4)
    assert (one.problems, one.samples, one.prompts_too_long) == (3, 2, 4)
    assert one.mean_at_k.value == pytest.approx(2 / 6) == one.pass_at_k[1].value
    assert one.pass_at_k[2].value == pytest.approx(2 / 3)
    assert (one.truncated, one.verifier_timeouts, one.verifier_crashes) == (0.5, 1, 1)
    assert one.response_tokens == pytest.approx((1 + 1 + 1 + 2 + 1 + 3) / 6)
    three = replace(one, name="three", pass_at_k={3: one.mean_at_k})
    write_results(tmp_path, config, [one, three])
    page = json.loads((tmp_path / "results.json").read_text())
    assert page["model"] == "embedded" and page["rollout"]["top_k"] == 20
    found = page["benchmarks"]["one"]
    assert found["mean_at_k"] == asdict(one.mean_at_k) and found["pass_at_k"].keys() == {"1", "2"}
    assert found["pass_at_k"]["2"]["low"] < 2 / 3 < found["pass_at_k"]["2"]["high"]
    assert (found["problems"], found["verifier_timeouts"], found["verifier_crashes"]) == (3, 1, 1)
    table = [
        line.split(" | ")
        for line in (tmp_path / "results.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert table[0][:7] == ["| benchmark", "problems", "n", "mean@n", "pass@1", "pass@2", "pass@3"]
    low, high = 100 * one.mean_at_k.low, 100 * one.mean_at_k.high
    assert table[2][3] == f"33.3 [{low:.1f}, {high:.1f}]"
    assert table[2][6] == "-" == table[3][4]
    assert {len(row) for row in table} == {11}
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(terminal_table([one, three]))
    assert "pass@3" in capture.get() and "33.3 [" in capture.get() and "50.0 %" in capture.get()


def test_all_wrong_is_not_a_certain_zero():
    zero = result_of(
        "zero", [replace(line, reward=0.0) for line in lines()], samples=SAMPLES, ks=[2], num_too_long=0
    )
    assert (zero.mean_at_k.value, zero.mean_at_k.low) == (0.0, 0.0)
    assert zero.mean_at_k.high > 0.5  # three problems say little
    assert math.isfinite(zero.pass_at_k[2].high)
