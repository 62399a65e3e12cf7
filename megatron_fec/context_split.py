"""The split of packed sequences over context-parallel ranks: Megatron's and Transformer Engine's load-balanced one."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sequence_multiple(context_parallel: int) -> int:
    """Every packed sequence, the padding too, has a length that is a multiple of it."""
    return 2 * context_parallel if context_parallel > 1 else 1


def context_indices(cu_seqlens: Tensor, *, rank: int, size: int) -> Tensor:
    """[T / size] the tokens of a packed micro-batch that context rank `rank` of `size` holds, in its order.

    cu_seqlens: [N + 1] starts of the padded sequences, then T. Each sequence is cut into 2 * size equal chunks, of
    which rank r holds r and 2 * size - 1 - r: under the causal mask all ranks then have the same work. It is the split
    that Transformer Engine's attention assumes (tex.thd_get_partitioned_indices) and megatron-core's rotary embedding.
    """
    import torch  # here, because config.py needs the rule above and loads no torch

    if size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    chunks = []
    for start, end in pairwise(cu_seqlens.tolist()):
        assert (end - start) % (2 * size) == 0, (
            f"a sequence of {end - start} cannot be cut into {2 * size} chunks"
        )
        length = (end - start) // (2 * size)
        for chunk in (rank, 2 * size - 1 - rank):
            chunks.append(torch.arange(start + chunk * length, start + (chunk + 1) * length))
    return torch.cat(chunks).to(cu_seqlens.device)
