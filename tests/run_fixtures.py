"""Whole runs in processes of their own, for the end-to-end tests: how they are started and read.

All are fp32 and seeded.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs" / "tiny_cpu.yaml")
DEADLINE = 150.0  # seconds for one run; they take 10 to 40
COMMAND = "from megatron_fec.cli import app; app()"  # the console script, wherever it is installed
NUM_PUZZLES = 16
SETTINGS = {  # all that the results depend on and that the file may choose otherwise
    "policy.tensor_parallel": 1,
    "policy.precision": "fp32",
    "optimizer.lr": 3e-4,
    "algorithm.prompts_per_update": 4,
    "algorithm.epochs": 2,
    "algorithm.thresholds.upper": "[-0.25,0.5]",
    "algorithm.thresholds.lower": "[-0.13,0.3]",
    "algorithm.schedule.name": "id",
    "algorithm.schedule.total_steps": 20,
    "rollout.engine": "native",
    "rollout.tensor_parallel": 1,
    "rollout.prompts_per_step": 16,
    "rollout.group_size": 8,
    "data.validation": "null",
    "warm_start.steps": 0,
    "trainer.max_steps": 20,
    "trainer.save_every": 0,
    "trainer.eval_every": 0,
    "trainer.seed": 1,
}
TWO_STEPS = {"trainer.max_steps": 2, "trainer.save_every": 3}
LONG = {
    "rollout.group_size": 16,
    "trainer.save_every": 5,
    "trainer.eval_every": 20,
    "trainer.eval_samples": 4,
}
SMALL = {  # four short steps on two ranks, in which the weights and every state move without any reward
    "model.path": "embedded",
    "data.train": "embedded:countdown",
    "data.validation": "embedded:countdown:validation",
    "policy.tensor_parallel": 2,
    "policy.micro_batch_tokens": 256,
    "optimizer.lr_schedule": "cosine",
    "algorithm.policy_loss": "clip+adaptive_entropy_bonus",
    "algorithm.advantage": "dcpo",
    "algorithm.options.entropy_target_ratio": 1.5,
    "algorithm.prompts_per_update": 2,
    "algorithm.schedule.name": "od",
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "trainer.max_steps": 4,
    "trainer.eval_every": 2,
    "trainer.eval_samples": 1,
    "trainer.keep_checkpoints": 9,
}

Row = dict[str, Any]


# ------------------------------------------------------------------ starting runs


def command(run_dir: Path, settings: dict[str, Any], processes: int, launcher: str) -> list[str]:
    script = str(ROOT / "launch" / "train.py")
    start = {
        "script": [script],
        "torchrun": [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            script,
        ],
        "megatron-fec": ["-c", COMMAND, "train", "--processes", str(processes)],
    }[launcher]
    merged = SETTINGS | {"trainer.run_dir": run_dir} | settings
    return [sys.executable, *start, "--config", CONFIG, *(f"{key}={value}" for key, value in merged.items())]


@contextmanager
def started(
    run_dir: Path, settings: dict[str, Any], processes: int = 1, launcher: str = "script", prefix: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """The run as a child in a session of its own, which is gone at the end. prefix: what a shell does before it."""
    with socket.socket() as probe:  # the port of a run without torchrun
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shell = ["bash", "-c", f'{prefix}; exec "$@"', "bash"] if prefix else []
    with in_own_session(
        shell + command(run_dir, settings, processes, launcher),
        {"MASTER_PORT": str(port), "WANDB_SILENT": "true"},
    ) as child:
        yield child


@contextmanager
def in_own_session(
    command: Sequence[str | Path], environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A child from the root of the repository, its output in one pipe; all of its session is gone at the end."""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def outcome(
    run_dir: Path, settings: dict[str, Any], processes: int = 1, launcher: str = "script"
) -> tuple[int, str]:
    """(exit code, all output) of a run that must end before the deadline, all its ranks included."""
    with started(run_dir, settings, processes, launcher) as child:
        text, _ = child.communicate(timeout=DEADLINE)
        return child.returncode, text


def train(run_dir: Path, settings: dict[str, Any], processes: int = 1) -> Path:
    code, text = outcome(run_dir, settings, processes, "torchrun" if processes > 1 else "script")
    assert code == 0, text
    return run_dir


# ------------------------------------------------------------------ reading runs


def rows_of(run_dir: Path) -> list[Row]:
    """Rows of metrics.jsonl without what the clock and the allocator decide."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    is_timed = ("timers/", "memory/", "train_rollouts/tokens_per_second")
    return [{key: value for key, value in row.items() if not key.startswith(is_timed)} for row in rows]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def without_newest_checkpoint(run_dir: Path, target: Path) -> Path:
    """A copy of a finished run as it was before its last save; the rows after that save stay, as after a crash."""
    shutil.copytree(run_dir, target)
    checkpoints = sorted((target / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_000005", "step_000010"]
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(target / "hf")
    return target
