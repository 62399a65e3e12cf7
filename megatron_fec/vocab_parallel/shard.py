"""How a vocabulary is cut over ranks and blocks, and the numbers that the kernels (torch, Triton) agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LN2 = math.log(2.0)
# Of u: e^u and 2^u are exactly 0 there, also in fp64, and u e^u is not NaN for a column at -inf.
FLOOR = -1100.0
# Of a vocabulary: tensor-parallel sizes that divide it add the same blocks, so they agree in every bit.
BLOCKS = 8
# Columns: a block's width is a multiple of it, which keeps a kernel's loads and a product's rows aligned.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Columns [start, start + width) of the vocabulary, worked on in blocks of equal width (but for the last ones)."""

    start: int  # global id of the first column
    width: int  # columns, padding included; the same on every rank
    valid: int  # columns before the padding, 0 <= valid <= width
    blocks: int  # parts of this shard, at least 1

    @property
    def block_width(self) -> int:
        return -(-self.width // (self.blocks * ALIGNMENT)) * ALIGNMENT

    def block_columns(self) -> list[slice]:
        """The real columns of each block; a block of padding is empty."""
        step = self.block_width
        starts = (min(i * step, self.valid) for i in range(self.blocks))
        return [slice(first, min(first + step, self.valid)) for first in starts]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabLayout:
    """This rank's shard, and who holds the others."""

    shard: Shard
    vocab_size: int  # the true one
    group: dist.ProcessGroup | None
    ranks: int


def vocab_layout(
    width: int, *, group: dist.ProcessGroup | None, vocab_size: int | None, blocks: int | None = None
) -> VocabLayout:
    """The layout of a shard of `width` columns; blocks: of this shard, default its part of BLOCKS.

    Raises ValueError if the group does not contain this rank.
    """
    ranks, rank = 1, 0
    if group is not None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        require(
            rank >= 0,
            f"group={group} must contain this rank, global rank {dist.get_rank()}. "
            "Pass this rank's tensor-parallel group.",
        )
    vocabulary = width * ranks if vocab_size is None else vocab_size
    shard = Shard(
        start=rank * width,
        width=width,
        valid=min(max(vocabulary - rank * width, 0), width),
        blocks=blocks or max(1, BLOCKS // ranks),
    )
    return VocabLayout(shard=shard, vocab_size=vocabulary, group=group, ranks=ranks)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of all arithmetic: fp64 for fp64 logits, else fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def require(is_met: bool, message: str) -> None:
    if not is_met:
        raise ValueError(message)
