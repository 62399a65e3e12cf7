"""A run of three steps as a user starts it: vLLM that sleeps, a policy that leaves, a validation and a save in each step.

python -m pytest tests/gpu/test_train_end_to_end.py      # the second test needs two GPUs
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
MISMATCH_LIMIT = 0.05  # rollout.mismatch_limit's default, which the run itself enforces
SETTINGS = {  # beside run_fixtures.SETTINGS
    "model.path": "embedded",
    "data.train": "embedded:countdown",
    "data.validation": "embedded:countdown:validation",
    "policy.precision": "bf16",
    "policy.distributed_optimizer": True,
    "policy.options.offload": "all",
    "rollout.engine": "vllm",
    "rollout.gpu_memory_utilization": 0.3,
    "rollout.group_size": 4,
    "trainer.max_steps": 3,
    "trainer.save_every": 1,
    "trainer.async_save": True,
    "trainer.eval_every": 1,
    "trainer.eval_samples": 1,
}


def check(run_dir: Path, tensor_parallel: int) -> None:
    from run_fixtures import train, weights_of  # torch and safetensors, which take time to import

    layout = {"policy.tensor_parallel": tensor_parallel, "rollout.tensor_parallel": tensor_parallel}
    train(run_dir, SETTINGS | layout, processes=tensor_parallel)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert all(value is not None and math.isfinite(value) for value in row.values())
        assert row["train_rollouts/mismatch"] < MISMATCH_LIMIT and row["train_optim/grad_norm"] > 0
        for part in ("generate", "refit", "logprobs", "train", "step"):
            assert 0 < row[f"memory/allocated_gib/{part}"] <= row[f"memory/reserved_gib/{part}"]
    assert rows[1]["memory/allocated_gib/save"] > 0  # of the save after step 0
    assert weights_of(run_dir / "hf")


@pytest.mark.gpu
def test_one_gpu(tmp_path: Path) -> None:
    check(tmp_path / "run", 1)


@pytest.mark.gpu(2)
def test_two_gpus(tmp_path: Path) -> None:
    check(tmp_path / "run", 2)
