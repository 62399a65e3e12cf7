"""The two passes over a vocabulary shard in plain torch: sums forward, gradient backward; for CPU and for fp64.

Chunks of rows small enough for the cache are read once; the arithmetic is in base 2, v = (z - m) log2(e) / temperature,
because exp2 is one vector polynomial on every CPU, and exp is not. triton_kernel has the same two functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_fec.vocab_parallel.shard import FLOOR, LN2, Shard, compute_dtype

SCRATCH_BYTES = {"cpu": 2 << 20, "cuda": 512 << 20}  # of a chunk: stays in the cache; few launches


def shard_sums(
    logits: Tensor,
    labels: Tensor,
    *,
    shard: Shard,
    temperature: float,
    second_moments: bool,
    chunk_tokens: int | None = None,
) -> Tensor:
    """[T, blocks, 4 or 6]: m, s0, s1, t, [s2, s3] of each block of real columns, as token_stats defines them.

    logits: [T, width]; labels: [T] global ids. t is -inf where the label is not in the block. A block without a
    finite logit, as in a shard of padding, has the lowest finite m and zero sums.
    """
    dtype = compute_dtype(logits)
    lowest = torch.finfo(dtype).min
    sums = logits.new_zeros(logits.shape[0], shard.blocks, 6 if second_moments else 4, dtype=dtype)
    sums[..., 0] = lowest
    sums[..., 3] = -math.inf
    scratch, size = _scratch(logits, shard, chunk_tokens)
    for block, columns in enumerate(shard.block_columns()):
        real = logits[:, columns]
        if real.numel() == 0:
            continue
        column, is_here = _label_columns(labels, shard.start + columns.start, real.shape[1])
        label_logits = real.gather(1, column).squeeze(1).to(dtype)
        sums[:, block, 3] = label_logits.masked_fill_(~is_here, -math.inf)
        for rows, v, e in _chunks(real.shape, scratch, size):
            # Of the fp32 copy: amax of bf16 takes longer than both.
            maxima = v.copy_(real[rows]).amax(-1).clamp_(min=lowest)
            _centre(v, maxima, temperature)
            torch.exp2(v, out=e)
            sums[rows, block, 0] = maxima
            sums[rows, block, 1] = e.sum(-1)
            sums[rows, block, 2] = v.mul_(e).sum(-1) * LN2
            if second_moments:
                sums[rows, block, 5] = v.mul_(e).sum(-1) * LN2
                sums[rows, block, 4] = e.mul_(e).sum(-1)
    return sums


def write_gradient(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    row: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor | None],
    shard: Shard,
    temperature: float,
    chunk_tokens: int | None = None,
) -> None:
    """Write gl (1[j=a] - p_j) - gh p_j (u_j - c) to out, which may be the logits; padding columns become 0.

    row: m, ln s0, c of the whole row. grads, divided by the temperature: gl, gl at the label, gh (None is 0). All are
    [T] in the compute dtype; u = (z - m) / temperature. A row whose grads are all 0 becomes 0, whatever it holds.
    """
    out[:, shard.valid :] = 0
    maxima, log_s0, centre = row
    pull, label_pull, spread = grads
    log2_s0, centre = log_s0 / LN2, centre / LN2
    is_idle = (pull == 0) & (label_pull == 0)
    is_idle = is_idle if spread is None else is_idle & (spread == 0)
    idle = is_idle.tolist()
    scratch, size = _scratch(logits, shard, chunk_tokens)
    for columns in shard.block_columns():
        real, real_out = logits[:, columns], out[:, columns]
        if real.numel() == 0:
            continue
        column, is_here = _label_columns(labels, shard.start + columns.start, real.shape[1])
        here_pull = label_pull.masked_fill(~is_here, 0.0)
        for rows, grad, weight in _chunks(real.shape, scratch, size):
            if all(idle[rows]):
                real_out[rows] = 0
                continue
            v = _centre(grad.copy_(real[rows]), maxima[rows], temperature)
            if spread is not None:
                torch.sub(v, centre[rows, None], out=weight)
            grad.sub_(log2_s0[rows, None]).exp2_()
            if spread is None:
                grad.mul_(-pull[rows, None])
            else:
                weight.mul_(-LN2 * spread[rows, None]).sub_(pull[rows, None])
                grad.mul_(weight)
            grad.scatter_add_(1, column[rows], here_pull[rows, None])
            if any(idle[rows]):
                grad.masked_fill_(is_idle[rows, None], 0.0)  # 0 * NaN is not 0
            real_out[rows] = grad


def _scratch(logits: Tensor, shard: Shard, chunk_tokens: int | None) -> tuple[Tensor, int]:
    """[2, rows * block_width] in the compute dtype, for all blocks in turn: fresh memory costs page faults; and rows."""
    dtype = compute_dtype(logits)
    fitting = SCRATCH_BYTES[logits.device.type] // (2 * shard.block_width * dtype.itemsize)
    rows = min(chunk_tokens or max(1, fitting), logits.shape[0])
    return logits.new_empty(2, rows * shard.block_width, dtype=dtype), rows


def _chunks(shape: torch.Size, scratch: Tensor, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Ranges of at most `size` rows of a [T, width] block, each with two contiguous scratch buffers of its shape."""
    total, width = shape
    for first in range(0, total, size):
        rows = slice(first, min(first + size, total))
        count = rows.stop - first
        one, two = scratch[:, : count * width].unflatten(1, (count, width))
        yield rows, one, two


def _centre(logits: Tensor, maxima: Tensor, temperature: float) -> Tensor:
    """v = (z - m) log2(e) / temperature, at least FLOOR, in place. Subtracting first keeps large logits exact."""
    return logits.sub_(maxima[:, None]).mul_(1 / (LN2 * temperature)).clamp_(min=FLOOR)


def _label_columns(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """[T, 1] column of each label, some column where it is not here; [T] bool: it is here."""
    local = labels - start
    return local.clamp(0, width - 1)[:, None], (local >= 0) & (local < width)
