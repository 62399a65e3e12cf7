"""How the tests of this folder start policy_rank.py, and the small checkpoint whose widths every recipe divides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

TESTS = Path(__file__).resolve().parent.parent
DEADLINE = 300.0  # seconds: imports, NCCL, and kernels that are compiled at their first use
VOCABULARY, ROWS_WITHOUT_TOKEN = 37, 27


def save_checkpoint(folder: Path) -> Path:
    """Four layers of Qwen3: norms on queries and keys, grouped key-value heads; all widths are multiples of 128."""
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=VOCABULARY + ROWS_WITHOUT_TOKEN,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=64,
        initializer_range=0.08,
        tie_word_embeddings=False,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def run_policy(
    model_dir: Path,
    out_dir: Path,
    *,
    layers: str = "engine",
    steps: int = 0,
    check: bool = False,
    gpus: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """What policy_rank.py wrote of one policy in processes of its own: Transformer Engine reads its variables once."""
    out = out_dir / "seen.pt"
    defaults: dict[str, Any] = {
        "precision": "bf16",
        "distributed_optimizer": True,
        "micro_batch_tokens": 1024,
    }
    job = {
        "model": str(model_dir),
        "out": str(out),
        "settings": defaults | settings,
        "layers": layers,
        "steps": steps,
        "check": check,
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    done = subprocess.run(
        [*command, str(TESTS / "gpu" / "policy_rank.py"), json.dumps(job)],
        env=clean | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return torch.load(out, weights_only=False)


def distance(ours: dict[Any, float], theirs: dict[Any, float]) -> float:
    """The mean absolute difference over the same tokens."""
    assert ours.keys() == theirs.keys() and ours
    return sum(abs(ours[key] - theirs[key]) for key in ours) / len(ours)
