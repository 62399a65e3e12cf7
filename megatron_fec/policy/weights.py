"""Weights on their way out of Megatron: the stream that feeds the rollout engine, and a Hugging Face checkpoint."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fec.policy.step import Policy, unwrapped

# Of the checkpoint that training started from; config.json and the weights are written anew.
COPIED_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


@torch.no_grad()  # the gather works on the parameters themselves, and autograd must not see it
def hf_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of the Hugging Face checkpoint, gathered over TP and PP; every rank must iterate it all."""
    yield from policy.bridge.export_weights([unwrapped(policy.model)])


def export_hf(policy: Policy, source: Path, target: Path) -> None:
    """Writes `target`, a checkpoint that transformers loads, whole or not at all; source gives the tokenizer.

    Collective over the world; rank 0 writes. A checkpoint that is there is replaced.
    """
    writing = target.with_name(f".writing_{target.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # a single-file checkpoint has no index, of which mbridge warns
        policy.bridge.save_weights([unwrapped(policy.model)], str(writing))
    if dist.get_rank() == 0:
        for pattern in COPIED_FILES:
            for path in source.glob(pattern):
                shutil.copy2(path, writing)
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)
    dist.barrier()
