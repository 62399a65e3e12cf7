"""Whole runs in processes of their own: torchrun, launch/train.py, files on disk.

A policy is warm-started once, on the embedded task; the runs then reinforce it on sixteen puzzles in a file,
few enough for twenty steps to show. All are fp32 and seeded: "equal" means bit for bit where nothing else is said.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import (
    COMMAND,
    DEADLINE,
    LONG,
    NUM_PUZZLES,
    ROOT,
    TWO_STEPS,
    assert_same_weights,
    outcome,
    rows_of,
    started,
    train,
    weights_of,
    without_newest_checkpoint,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fec.config import load_config
from megatron_fec.rollout.engine import vllm_is_available
from megatron_fec.tasks.arithmetic import countdown_rows

pytestmark = pytest.mark.slow

HAS_WANDB = importlib.util.find_spec("wandb") is not None
needs_vllm = pytest.mark.skipif(not vllm_is_available(), reason="vllm is not installed")


# ------------------------------------------------------------------ runs that several tests look at


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "puzzles.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in countdown_rows("train")[:NUM_PUZZLES]))
    return path


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that writes expressions and seldom the right one: 150 supervised steps and one of reinforcement."""
    embedded = {"model.path": "embedded", "data.train": "embedded:countdown", "warm_start.steps": 150}
    return train(tmp_path_factory.mktemp("warm") / "run", embedded | {"trainer.max_steps": 1}) / "warm_start"


@pytest.fixture(scope="module")
def task(warm: Path, puzzles: Path) -> dict[str, Any]:
    return {"model.path": warm, "data.train": puzzles}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, task: dict[str, Any]) -> Path:
    """Twenty steps in one process, checkpoints at 5, 10, 15 and 20, the last two kept."""
    return train(
        tmp_path_factory.mktemp("undisturbed") / "run", task | LONG | {"data.validation": task["data.train"]}
    )


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, task: dict[str, Any]) -> Path:
    """Two steps on one process, with which layouts are compared; seen by wandb where that is installed."""
    tracking = {"trainer.wandb": "offline" if HAS_WANDB else "off"}
    return train(tmp_path_factory.mktemp("one_rank") / "run", task | TWO_STEPS | tracking)


# ------------------------------------------------------------------ learning and what a run leaves


def test_twenty_steps_raise_the_reward(undisturbed: Path):
    rewards = [row["train_rollouts/reward"] for row in rows_of(undisturbed)]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.25  # measured: from 0.12 to 0.69
    entropies = [row["train_rollouts/entropy"] for row in rows_of(undisturbed)]
    assert entropies[-1] < entropies[0]


def test_a_run_leaves_its_settings(undisturbed: Path, puzzles: Path):
    config = load_config(undisturbed / "config.yaml")
    assert (config.data.train, config.optimizer.lr, config.trainer.run_dir) == (
        str(puzzles),
        3e-4,
        str(undisturbed),
    )
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == [
        "step_000015",
        "step_000020",
    ]
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "DONE",
        "checkpoints",
        "config.yaml",
        "hf",
        "metrics.jsonl",
        "report.html",
    ]


def test_a_run_leaves_its_metrics(undisturbed: Path):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(20))
    promised = {
        "train_rollouts/": "reward entropy response_length truncated mismatch",
        "train_optim/": "loss grad_norm eps_upper_mean eps_lower_mean clip_fraction_upper clip_fraction_lower "
        "ratio_moved",
        "timers/": "generate logprobs train refit step",
        "memory/host_gib/": "generate logprobs train refit step",
    }
    keys = {prefix + name for prefix, names in promised.items() for name in names.split()}
    assert all(keys <= row.keys() for row in rows)
    assert all(isinstance(value, int | float) for row in rows for value in row.values())
    validation = {key: value for key, value in rows[-1].items() if key.startswith("val_rollouts/")}
    ks = ["mean_at_k/4", "pass_at_k/1", "pass_at_k/2", "pass_at_k/4"]
    assert sorted(validation) == [f"val_rollouts/{name}" for name in ks]
    assert 0.25 < validation["val_rollouts/pass_at_k/1"] <= validation["val_rollouts/pass_at_k/4"] <= 1
    assert not any(key.startswith("val_rollouts/") for row in rows[:-1] for key in row)


def test_a_run_leaves_a_report(undisturbed: Path):
    page = (undisturbed / "report.html").read_text()
    assert "20 steps" in page
    assert page.count("data:image/svg+xml;base64,") >= 9


def test_transformers_answers_with_the_trained_weights(undisturbed: Path, warm: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(undisturbed / "hf")
    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "hf")
    prompt = countdown_rows("train")[0]["prompt"][0]["content"]
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert set(prompt[:3]) <= set(text)  # it uses the puzzle's numbers
    before, after = weights_of(warm), weights_of(undisturbed / "hf")
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def convert(checkpoint: Path, output: Path) -> None:
    arguments = ["convert", str(checkpoint), str(output)]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr


def test_convert_equals_the_export_of_the_run(undisturbed: Path, tmp_path: Path):
    checkpoint = undisturbed / "checkpoints" / "step_000020"
    convert(checkpoint, tmp_path / "hf")
    assert_same_weights(tmp_path / "hf", undisturbed / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id is not None


def test_convert_of_a_run_in_fp8_needs_no_gpu(undisturbed: Path, tmp_path: Path):
    """Its weights are bf16; only what it says of itself is changed here, for no run in FP8 can be made."""
    checkpoint = Path("checkpoints") / "step_000020"
    shutil.copytree(undisturbed / checkpoint, tmp_path / "run" / checkpoint)
    text = (undisturbed / "config.yaml").read_text()
    assert "precision: fp32" in text
    (tmp_path / "run" / "config.yaml").write_text(text.replace("precision: fp32", "precision: fp8_blockwise"))
    convert(tmp_path / "run" / checkpoint, tmp_path / "hf")
    exact = weights_of(undisturbed / "hf")
    assert all(torch.equal(w, exact[name].bfloat16()) for name, w in weights_of(tmp_path / "hf").items())


# ------------------------------------------------------------------ interruptions


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    undisturbed: Path, task: dict[str, Any], tmp_path: Path
):
    """Nor does it matter that gradients and optimizer are away while it samples, and moved back for each save."""
    settings = task | LONG | {"data.validation": task["data.train"], "policy.options.offload": "all"}
    run_dir = tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    with started(run_dir, settings) as child:
        end = time.monotonic() + DEADLINE
        while not (metrics.exists() and metrics.read_text().count("\n") >= 7):
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.02)
        child.kill()  # the rank alone, as the kernel does when memory runs out
        assert child.wait() == -signal.SIGKILL
    killed_at = len(rows_of(run_dir))
    assert 7 <= killed_at < 20
    assert not (run_dir / "hf").exists()
    code, text = outcome(run_dir, settings)
    assert code == 0, text
    assert f"resumed from {run_dir / 'checkpoints' / 'step_0000'}" in text
    assert rows_of(run_dir) == rows_of(undisturbed)
    assert_same_weights(run_dir / "hf", undisturbed / "hf")


def test_ten_steps_equal_five_and_resume_and_five(task: dict[str, Any], tmp_path: Path):
    """On TP 2, with vLLM where it is, a decaying learning rate, and OD: it keeps a mode and the first entropy."""
    settings = task | {
        "policy.tensor_parallel": 2,
        "rollout.tensor_parallel": 2,
        "rollout.engine": "vllm" if vllm_is_available() else "native",
        "optimizer.lr_schedule": "cosine",
        "algorithm.schedule.name": "od",
        "algorithm.schedule.options.h_min_ratio": 0.99,  # so near that the mode turns before the save
        "rollout.group_size": 16,
        "trainer.seed": 3,
        "trainer.max_steps": 10,
        "trainer.save_every": 5,
    }
    whole = train(tmp_path / "whole", settings, processes=2)
    modes = [row["train_optim/weight_upper"] for row in rows_of(whole)]
    assert len(set(modes[:5])) == 2, modes
    resumed = without_newest_checkpoint(whole, tmp_path / "resumed")
    moved = {"trainer.async_save": True, "policy.options.offload": "all"}  # a fork beside vLLM, weights away
    train(resumed, settings | moved, processes=2)
    assert rows_of(resumed) == rows_of(whole)
    state = Path("checkpoints", "step_000010", "trainer_state.json")
    assert (resumed / state).read_text() == (whole / state).read_text()
    assert f'"h_init": {rows_of(whole)[0]["train_rollouts/entropy"]}' in (whole / state).read_text()
    assert_same_weights(resumed / "hf", whole / "hf")


# ------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    ("tensor", "pipeline", "engine"),
    [(2, 2, "native"), (2, 1, "native"), pytest.param(2, 1, "vllm", marks=needs_vllm)],
)
def test_four_processes_take_the_first_step_of_one(
    one_rank: Path, task: dict[str, Any], tmp_path: Path, tensor: int, pipeline: int, engine: str
):
    """TP 2 x PP 2, and DP 2 x TP 2; sums in another order differ by fp32 noise, and the loss is a small difference."""
    layout = {
        "policy.tensor_parallel": tensor,
        "policy.pipeline_parallel": pipeline,
        "rollout.engine": engine,
        "rollout.tensor_parallel": tensor,
    }
    row = rows_of(train(tmp_path / "run", task | TWO_STEPS | layout, processes=4))[0]
    expected = rows_of(one_rank)[0]
    assert row["train_rollouts/mismatch"] < 1e-5
    if engine == "native":  # the same samples in every layout; vLLM draws its own
        assert row["train_rollouts/reward"] == expected["train_rollouts/reward"]
        assert row["train_rollouts/entropy"] == pytest.approx(expected["train_rollouts/entropy"], rel=1e-6)
        assert row["train_optim/loss"] == pytest.approx(expected["train_optim/loss"], rel=1e-3)
        assert row["train_optim/grad_norm"] == pytest.approx(expected["train_optim/grad_norm"], rel=1e-3)
    else:
        assert row["train_rollouts/entropy"] == pytest.approx(expected["train_rollouts/entropy"], rel=0.05)


@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")
def test_wandb_offline_writes_its_folder(one_rank: Path):
    assert len(list((one_rank / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


# ------------------------------------------------------------------ guards and bad input


def test_engine_and_trainer_that_disagree_stop_all_ranks(task: dict[str, Any], tmp_path: Path):
    settings = task | TWO_STEPS | {"policy.tensor_parallel": 2, "rollout.mismatch_limit": 1e-12}
    code, text = outcome(tmp_path / "run", settings, 2, "megatron-fec")
    assert code == 1, text
    assert text.count("RunError: step 0: trainer and engine log-probs differ by") == 2, text
    assert "more than rollout.mismatch_limit=1e-12" in text
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_broken_line_stops_before_any_weight(task: dict[str, Any], puzzles: Path, tmp_path: Path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(puzzles.read_text() + "{half a line\n")
    settings = task | {"data.train": broken, "policy.tensor_parallel": 2}
    code, text = outcome(tmp_path / "run", settings, 2, "megatron-fec")
    assert code == 2, text
    assert text.count("error: ") == 1, text
    assert f"error: data.train={broken} is broken JSON in line {NUM_PUZZLES + 1}: " in text
    assert "Mend or delete it." in text
    assert "Traceback" not in text
    assert list((tmp_path / "run").iterdir()) == []
