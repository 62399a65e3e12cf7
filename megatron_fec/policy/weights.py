"""Weights on their way out of Megatron: the stream that feeds the rollout engine, and a Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from megatron_fec.policy.expert_weights import GroupedNames, expert_weights
from megatron_fec.policy.fp8_weights import plain_weights
from megatron_fec.policy.step import Policy, cores, gather_weights

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
    """(name, full tensor) of the Hugging Face checkpoint, gathered over all ranks; each must iterate it all."""
    gather_weights(policy)
    models: list[torch.nn.Module] = [*cores(policy)]
    with plain_weights(models):
        if policy.bridge.config.num_moe_experts is None:
            yield from policy.bridge.export_weights(models)
        else:
            dense = [GroupedNames(model, has_experts=False) for model in models]
            yield from policy.bridge.export_weights(dense)  # type: ignore[arg-type]
            yield from expert_weights(models, policy.layout)


def export_hf(policy: Policy, source: Path, target: Path) -> None:
    """Writes `target`, a checkpoint that transformers loads, whole or not at all; source gives the tokenizer.

    Collective over the world; rank 0 writes. A checkpoint that is there is replaced.
    """
    writing = target.with_name(f".writing_{target.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    # Not mbridge's save_weights: it leaves out, with a warning, a file of which the source's index lists one more key.
    state: dict[str, Tensor] = {}
    for name, tensor in hf_weights(policy):  # collective: every rank iterates, rank 0 keeps
        if dist.get_rank() == 0:
            state[name] = tensor.to("cpu", copy=True).contiguous()
    if dist.get_rank() == 0:
        save_torch_state_dict(state, writing)
        policy.bridge.hf_config.save_pretrained(writing)  # pyright: ignore[reportAttributeAccessIssue]
        for pattern in COPIED_FILES:
            for path in source.glob(pattern):
                shutil.copy2(path, writing)
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)
    dist.barrier()
