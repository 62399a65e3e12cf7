"""Inside megatron-core's model: which tensors as large as the logits exist during an update, and what is sent for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from policy_fixtures import clip_token_loss, make_groups, on_layout, pack_for, save_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fec.config import PolicyConfig
from megatron_fec.policy.step import Policy, compute_logprobs, train_update

SHARD = 64  # columns; the next multiple of 64 on one rank and on each of two


class LogitsSeen(TorchDispatchMode):
    """Shape, dtype and storage of each tensor [.., T, .., 64] that an operation returned without being a view."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.seen: set[tuple[torch.dtype, int]] = set()
        self.held: list[Tensor] = []  # so that no storage is freed and taken again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, Tensor) or tensor.shape[-1:] != (SHARD,):
                continue
            if tensor.numel() >= self.tokens * SHARD:
                self.seen.add((tensor.dtype, tensor.untyped_storage().data_ptr()))
                self.held.append(tensor)
        return out


def logits_of_an_update(policy: Policy) -> list[torch.dtype]:
    """Dtypes of the distinct storages that held [T, 64] values, forward and backward."""
    (batches,) = pack_for(policy, make_groups(prompts=16))
    (batches,), _ = compute_logprobs(policy, [batches])
    assert len(batches) == 1 and SHARD not in batches[0].tokens.shape
    with LogitsSeen(batches[0].tokens.numel()) as logits:
        train_update(policy, batches, clip_token_loss)
    return [dtype for dtype, _ in logits.seen]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), "qwen3")  # of no other width 64


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize(
    ("logits_chunk_tokens", "expected"),
    [(None, [torch.bfloat16]), (50, [])],  # the model's own, with the gradient written over them; none at all
)
def test_logits_exist_once_in_the_models_dtype(
    model: Path, tensor_parallel: int, logits_chunk_tokens: int | None, expected: list[torch.dtype]
) -> None:
    settings = PolicyConfig(
        precision="bf16", tensor_parallel=tensor_parallel, logits_chunk_tokens=logits_chunk_tokens
    )
    for found in on_layout(model, logits_of_an_update, settings):
        assert found == expected


def gathers_of_an_update(policy: Policy) -> list[int]:
    """Elements of each all-gather of a forward and backward pass: nothing else in this layout gathers."""
    (batches,) = pack_for(policy, make_groups())
    (batches,), _ = compute_logprobs(policy, [batches])
    calls = []
    gather = dist.all_gather_into_tensor

    def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(output.numel())
        return gather(output, *args, **kwargs)

    dist.all_gather_into_tensor = counted
    train_update(policy, batches, clip_token_loss)
    return [calls[0] // batches[0].tokens.numel(), len(calls)]


@pytest.mark.parametrize("logits_chunk_tokens", [None, 50])
def test_one_gather_of_the_sums_per_micro_batch(model: Path, logits_chunk_tokens: int | None) -> None:
    settings = PolicyConfig(
        precision="fp32",
        tensor_parallel=2,
        distributed_optimizer=False,
        logits_chunk_tokens=logits_chunk_tokens,
    )
    for floats, calls in on_layout(model, gathers_of_an_update, settings):
        assert calls == 1
        assert floats == (8 * 6 if logits_chunk_tokens is None else 2 * 6)  # 6: with the second moments
