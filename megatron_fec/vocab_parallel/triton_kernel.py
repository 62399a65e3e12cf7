"""The two passes over a vocabulary shard as Triton kernels: sums forward, gradient backward; bf16, fp16 and fp32 logits.

6 bytes of memory traffic for a bf16 logit: one read forward, one read and one write backward. As in torch_kernel, which
has the same two functions, the arithmetic is in base 2, v = (z - m) log2(e) / temperature. All of it is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import KernelInterface

from megatron_fec.vocab_parallel.shard import FLOOR, LN2, Shard

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LEAST_EXPONENT = tl.constexpr(FLOOR)
# Columns at a time: 32 for each thread; on the CPU, in Triton's interpreter, few enough for tests of several tiles.
TILE = {"cpu": 16, "cuda": 4096}


def shard_sums(
    logits: Tensor,
    labels: Tensor,
    *,
    shard: Shard,
    temperature: float,
    second_moments: bool,
    chunk_tokens: int | None = None,
) -> Tensor:
    """[T, blocks, 4 or 6] fp32: m, s0, s1, t, [s2, s3] of each block of real columns, as token_stats defines them.

    logits: [T, width] of any strides; labels: [T] int64 global ids. t is -inf where the label is not in the block. A
    block without a finite logit, as in a shard of padding, has the lowest finite m and zero sums. A NaN logit makes
    s0 and s1 NaN. chunk_tokens is unused: there is no scratch memory.
    """
    programs = logits.shape[0] * shard.blocks
    sums = logits.new_empty(logits.shape[0], shard.blocks, 6 if second_moments else 4, dtype=torch.float32)
    _launch(
        _sums_kernel,
        programs,
        sums,
        logits,
        labels.contiguous(),
        logits.stride(0),
        logits.stride(1),
        shard.start,
        shard.width,
        shard.valid,
        shard.blocks,
        shard.block_width,
        1.0 / (LN2 * temperature),
        LN2,
        has_second=second_moments,
        tile=TILE[logits.device.type],
    )
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
    [T] fp32; u = (z - m) / temperature. The logits of a row whose grads are all 0 are not read.
    """
    maxima, log_s0, centre = row
    pull, label_pull, spread = grads
    spread = torch.zeros_like(pull) if spread is None else spread
    tile = TILE[logits.device.type]
    tiles = -(-shard.width // tile)
    _launch(
        _gradient_kernel,
        logits.shape[0] * tiles,
        out,
        logits,
        labels.contiguous(),
        torch.stack([maxima, log_s0 / LN2, centre / LN2, pull, label_pull, spread * LN2], 1),
        out.stride(0),
        out.stride(1),
        logits.stride(0),
        logits.stride(1),
        shard.start,
        shard.width,
        shard.valid,
        tiles,
        1.0 / (LN2 * temperature),
        tile=tile,
    )


def _launch(
    kernel: KernelInterface[Any],
    programs: int,
    result: Tensor,
    *arguments: Tensor | int | float,
    **constants: int,
) -> None:
    """Runs so many programs on the device of `result`, the first argument."""
    # enable_fp_fusion is the default, but Triton 3.9 warns about a change to come where it is not said.
    with torch.cuda.device_of(result):
        kernel[(programs,)](result, *arguments, **constants, num_warps=4, enable_fp_fusion=True)


@triton.jit
def _exponents(z, maximum, scale):
    """v, at least FLOOR. A NaN stays one, which PTX's plain max would replace by FLOOR."""
    return tl.maximum((z - maximum) * scale, LEAST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_tile(z, maximum, s0, s1, s2, s3, scale, has_second: tl.constexpr):
    """The sums, moved to the new maximum (the higher moment first) and with one more tile of logits in them."""
    z = z.to(tl.float32)
    new_maximum = tl.maximum(maximum, tl.max(z, 0))
    v = _exponents(z, new_maximum, scale)
    e = tl.exp2(v)
    shift = _exponents(maximum, new_maximum, scale)
    factor = tl.exp2(shift)
    s1 = factor * (s1 + shift * s0) + tl.sum(v * e, 0)
    s0 = factor * s0 + tl.sum(e, 0)
    if has_second:
        factor *= factor
        e *= e
        s3 = factor * (s3 + shift * s2) + tl.sum(v * e, 0)
        s2 = factor * s2 + tl.sum(e, 0)
    return new_maximum, s0, s1, s2, s3


@triton.jit
def _sums_kernel(
    sums,
    logits,
    labels,
    row_stride,
    column_stride,
    start,
    width,
    valid,
    blocks,
    block_width,
    scale,
    ln2,
    has_second: tl.constexpr,
    tile: tl.constexpr,
):
    """One program reduces one block of one row, whose last tile alone is masked.

    It is read up to the block's end, padding too: block ends are multiples of 16, and the end of the padding is not.
    """
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    first = (program % blocks) * block_width
    end = tl.maximum(tl.minimum(first + block_width, valid), first)
    last_tile = first + (end - first) // tile * tile
    logits += row * row_stride
    columns = tl.arange(0, tile)
    # pyright sees _add_tile as what it is outside a kernel, a function that raises.
    maximum = LOWEST
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    for tile_first in range(first, last_tile, tile):
        offsets = (tile_first + columns).to(tl.int64) * column_stride
        z = tl.load(logits + offsets, eviction_policy="evict_first")
        maximum, s0, s1, s2, s3 = _add_tile(z, maximum, s0, s1, s2, s3, scale, has_second)  # pyright: ignore[reportGeneralTypeIssues]
    columns += last_tile
    offsets = columns.to(tl.int64) * column_stride
    is_in_block = columns < tl.minimum(first + block_width, width)
    z = tl.load(logits + offsets, mask=is_in_block, other=float("-inf"), eviction_policy="evict_first")
    z = tl.where(columns < end, z.to(tl.float32), float("-inf"))
    maximum, s0, s1, s2, s3 = _add_tile(z, maximum, s0, s1, s2, s3, scale, has_second)  # pyright: ignore[reportGeneralTypeIssues]

    label = tl.load(labels + row) - start
    is_here = (label >= first) & (label < end)
    label_logit = tl.load(logits + label * column_stride, mask=is_here, other=float("-inf"))
    sums += program.to(tl.int64) * (6 if has_second else 4)
    tl.store(sums, maximum)
    tl.store(sums + 1, s0)
    tl.store(sums + 2, s1 * ln2)
    tl.store(sums + 3, label_logit.to(tl.float32))
    if has_second:
        tl.store(sums + 4, s2)
        tl.store(sums + 5, s3 * ln2)


@triton.jit
def _gradient_kernel(
    out,
    logits,
    labels,
    coefficients,
    out_row_stride,
    out_column_stride,
    row_stride,
    column_stride,
    start,
    width,
    valid,
    tiles,
    scale,
    tile: tl.constexpr,
):
    """One program: one tile of one row; each element is read and then written by the same thread."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    columns = (program % tiles) * tile + tl.arange(0, tile)
    coefficients += row * 6
    pull = tl.load(coefficients + 3)
    label_pull = tl.load(coefficients + 4)
    spread = tl.load(coefficients + 5)
    gradient = tl.zeros([tile], tl.float32)
    if (pull != 0.0) | (label_pull != 0.0) | (spread != 0.0):
        maximum = tl.load(coefficients)
        log2_s0 = tl.load(coefficients + 1)
        centre = tl.load(coefficients + 2)
        label = tl.load(labels + row) - start
        z = tl.load(
            logits + row * row_stride + columns.to(tl.int64) * column_stride,
            mask=columns < width,
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        v = _exponents(z, maximum, scale)
        gradient = -tl.exp2(v - log2_s0) * (pull + spread * (v - centre))
        gradient = tl.where(columns == label, gradient + label_pull, gradient)
        gradient = tl.where(columns < valid, gradient, 0.0)
    out += row * out_row_stride + columns.to(tl.int64) * out_column_stride
    tl.store(out, gradient, mask=columns < width)
