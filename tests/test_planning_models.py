"""What the planner takes for exact, against the real megatron-core: every planned model, on the meta device, rank by rank.

The process group is torch's fake one, which takes any world size and communicates nothing: nothing is computed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mbridge.core.llm_bridge import LLMBridge
from ranks import run_on_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from megatron_fec.config import Config, load_config
from megatron_fec.planning.command import find_model, stated_nodes
from megatron_fec.planning.models import PUBLISHED, shipped_config
from megatron_fec.planning.table import planned_configs
from megatron_fec.policy import model as policy_model
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.parallel import ParallelLayout, initialize_parallel
from megatron_fec.policy.sizes import parameter_count, places, stage_memory
from megatron_fec.policy.step import build_policy
from megatron_fec.policy_options import FP8

# FP8 layers are built on a GPU only.
BUILT = [path for path in planned_configs() if load_config(path).policy.precision not in FP8]
STATE_BYTES = 12  # of AdamW for each of its parameters: fp32 weight and two moments


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_architectures_have_the_published_number_of_parameters(name: str):
    path = shipped_config(name)
    assert path is not None
    hf_config = load_hf_config(str(path))
    assert parameter_count(hf_config) == PUBLISHED[name]
    assert hf_config == AutoConfig.from_pretrained(path)


def test_every_shipped_file_is_named():
    folder = Path(str(shipped_config(next(iter(PUBLISHED))))).parent
    assert {path.stem for path in folder.iterdir()} == {name.split("/")[1] for name in PUBLISHED}
    assert shipped_config("Qwen/Qwen2.5-7B-Instruct") is None


def fake_layout(config: Config, *, rank: int, world_size: int) -> ParallelLayout:
    """This process as one rank of a world that is not there."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})  # type: ignore[assignment]
    return initialize_parallel(config.policy, seed=1)


def allocated(config: Config, *, rank: int, world_size: int) -> tuple[int, int, int]:
    """Parameters, and bytes of gradient buffers and optimizer, of a rank of the real model, DDP and optimizer."""
    meta = torch.device("meta")
    layout = fake_layout(config, rank=rank, world_size=world_size)
    torch.cuda.current_device = lambda: meta  # type: ignore[assignment, return-value]
    policy_model.device = lambda: meta
    LLMBridge.load_weights = lambda *args, **kwargs: None
    with meta:
        built: Any = build_policy(
            str(shipped_config(config.model.path)),
            config.policy,
            config.optimizer,
            layout=layout,
            temperature=1.0,
            total_steps=1,
            vocab_size=1 << 20,
        )
    chunks = built.chunks
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    buffers = [b.grad_data for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    inner = [each.optimizer for each in getattr(built.optimizer, "chained_optimizers", [built.optimizer])]
    stepped = sum(p.numel() for each in inner for group in each.param_groups for p in group["params"])
    return parameters, sum(b.numel() * b.element_size() for b in buffers), STATE_BYTES * stepped


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
def test_parameters_gradients_and_optimizer_are_those_of_megatron(path: Path):
    """The first rank of each pipeline stage, at the configuration's own layout and number of nodes; exact."""
    config, world_size = load_config(path), 8 * stated_nodes(path)
    model, _ = find_model(config)
    first_ranks = {place.pipeline: place.rank for place in reversed(places(config.policy, world_size))}
    for stage, rank in first_ranks.items():
        [got] = run_on_ranks(1, lambda _, rank=rank: allocated(config, rank=rank, world_size=world_size))
        held = stage_memory(model.hf_config, config.policy, stage, world_size=world_size)
        assert got == (held.parameters, held.gradients, held.optimizer)
