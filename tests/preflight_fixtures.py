"""Settings, a group of one rank and a checkpoint's shell for the tests of a run's inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from transformers import AutoConfig

from megatron_fec.config import Config, load_config
from megatron_fec.policy.checkpoint import MODEL_SIZES
from megatron_fec.policy.checkpoint_files import STATE_FILE, synced_digest, write_manifest
from megatron_fec.preflight import Inputs, prepare_inputs

SETTINGS = """
model: {path: embedded}
policy: {precision: fp32, distributed_optimizer: false}
algorithm: {prompts_per_update: 4, schedule: {name: id, total_steps: 6, options: {lower_schedule: text}}}
rollout: {engine: native, prompts_per_step: 12, group_size: 3, max_prompt_tokens: 10, max_response_tokens: 22}
data: {train: embedded:countdown, prompt_style: plain}
trainer: {max_steps: 5}
"""
MEGATRON_FILES = ["common.pt", "metadata.json"]


@contextmanager
def world_of_one() -> Iterator[None]:
    """A group around one call: a test that forks ranks must not hand them a group."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def config_of(folder: Path, *overrides: str) -> Config:
    """The settings with run_dir `folder`/run, which come in order before the overrides."""
    path = folder / "settings.yaml"
    path.write_text(SETTINGS)
    return load_config(path, [f"trainer.run_dir={folder / 'run'}", *overrides])


def prepared(folder: Path, *overrides: str, data_parallel: int = 1) -> Inputs:
    with world_of_one():
        return prepare_inputs(config_of(folder, *overrides), data_parallel=data_parallel)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fake_checkpoint(run_dir: Path, model: Path, **sizes: int) -> Path:
    """A folder that looks like a finished checkpoint of the model, tensors apart."""
    folder = run_dir / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    for name in MEGATRON_FILES:
        (folder / name).touch()
    hf_config = AutoConfig.from_pretrained(model)
    state = {
        "trainer": {"step": 3, "consumed_samples": 36, "weight_version": 3, "schedule": {}},
        "model": {name: getattr(hf_config, name) for name in MODEL_SIZES} | sizes,
        "distributed_optimizer": False,
        "world_size": 1,
    }
    (folder / STATE_FILE).write_text(json.dumps(state))
    write_manifest(folder, {path.name: synced_digest(path) for path in folder.iterdir()})
    return folder
