"""Log-probability and entropy of each token from vocabulary shards: one pass over the logits, one collective.

Each rank reduces its shard of a row to a few sums, with its maximum m of z and u = (z - m) / temperature:

    s0 = sum e^u    s1 = sum u e^u    t = z of the label, if it is here    [s2 = sum e^2u    s3 = sum u e^2u]

These floats are gathered, moved to the common maximum and added. With ln s0 and c = s1 / s0 of the whole row:

    ln p_j = u_j - ln s0    H = ln s0 - c   Q = sum p^2 = s2 / s0^2   B = sum p^2 (ln p + H) = s3 / s0^2 - c Q
    d ln p_a / dz_j = (1[j=a] - p_j) / temperature    dH / dz_j = -p_j (u_j - c) / temperature
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fec.types import TokenStats

IGNORED = -100  # a label with nothing to predict, as in torch's cross entropy
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCRATCH_BYTES = {
    "cpu": 8 << 20,
    "cuda": 512 << 20,
}  # both scratch buffers of a chunk together: a core's cache, or few launches
FLOOR = -1000.0  # of u: e^u is exactly 0 there, also in fp64, and u e^u is 0 and not NaN for a column at -inf


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    second_moments: bool = False,
    reuse_logits: bool = False,
) -> TokenStats:
    """Statistics of softmax(logits / temperature), the same bits on every rank of `group`.

    logits: [T, V_local] bf16, fp16, fp32 or fp64; rank r owns columns [r * V_local, (r + 1) * V_local), with
        one V_local on all ranks. Columns at -inf have probability 0 and gradient 0, under a label too.
    labels: [T] int64 global ids, the same on every rank. -100 is ignored: log-probability 0, entropy as
        usual, and a zero gradient row for both.
    group: the tensor-parallel group; None means that V_local is the whole vocabulary.
    vocab_size: the true vocabulary, default V_local * ranks; columns after it are padding and take no part.
    chunk_tokens: rows worked on at a time, default about 8 MB of scratch. Results do not depend on it, but
        for the last bit of a chunk of one row: torch splits its sums over CPU threads if there are several.
    second_moments: also return sum_p2 and baseline, which carry no gradient.
    reuse_logits: backward writes the gradient over the logits; it runs once, and nothing else may need them.

    Returns [T] fp32 (fp64 for fp64 logits), the dtype of all arithmetic; logprobs and entropy can be
    differentiated once. Forward: one all-gather of 4 floats a token (6 with second_moments), also if T is 0.
    Backward: no communication. Nothing but [T] tensors and the logits themselves is kept for it.

    Raises ValueError before the collective, from what all ranks share (shapes, settings, labels), so that all
    raise together and none is left waiting. Looking at the labels synchronizes a GPU.
    """
    _check_inputs(logits, labels, temperature, chunk_tokens)
    world_size, rank = _world_and_rank(group)
    width = logits.shape[1]
    vocabulary = width * world_size if vocab_size is None else vocab_size
    _check_vocabulary(labels, vocabulary, width, world_size)
    row_bytes = 2 * width * _compute_dtype(logits).itemsize
    shard = _Shard(
        group=group,
        world_size=world_size,
        start=rank * width,
        valid=min(max(vocabulary - rank * width, 0), width),
        temperature=temperature,
        chunk_tokens=chunk_tokens or max(1, SCRATCH_BYTES[logits.device.type] // max(row_bytes, 1)),
        second_moments=second_moments,
        reuse_logits=reuse_logits,
    )
    logprobs, entropy, *second = _TokenStats.apply(logits, labels, shard)
    sum_p2, baseline = second or (None, None)
    return TokenStats(logprobs=logprobs, entropy=entropy, sum_p2=sum_p2, baseline=baseline)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """This rank's columns, and how they are worked on."""

    group: dist.ProcessGroup | None
    world_size: int
    start: int  # global id of the first column
    valid: int  # columns before the padding
    temperature: float
    chunk_tokens: int
    second_moments: bool
    reuse_logits: bool

    def label_columns(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[T, 1] column of each label, some column where it is not in this shard; [T] bool: it is here."""
        local = labels - self.start
        return local.clamp(0, self.valid - 1)[:, None], (local >= 0) & (local < self.valid)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: _Shard) -> tuple[Tensor, ...]:
        gathered = _gather(_shard_sums(logits, labels, shard), shard)
        maxima, log_s0, centre, label_logits, *second = _merge(gathered, shard.temperature)
        logprobs = (label_logits - maxima).div_(shard.temperature).sub_(log_s0)
        logprobs.masked_fill_(labels == IGNORED, 0.0)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*second)
        # save_for_backward also makes autograd refuse logits that were changed between forward and backward.
        ctx.save_for_backward(logits, labels, maxima, log_s0, centre, logprobs)
        ctx.shard = shard
        ctx.is_spent = False
        return logprobs, log_s0 - centre, *second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        grad_logprobs, grad_entropy = grads[:2]
        shard: _Shard = ctx.shard
        if ctx.is_spent:
            raise RuntimeError(
                "token_stats: reuse_logits=True allows one backward, the logits now hold its gradient. "
                "Set reuse_logits=False to run backward again."
            )
        logits, labels, maxima, log_s0, centre, logprobs = ctx.saved_tensors
        ctx.is_spent = shard.reuse_logits
        ignored = labels == IGNORED
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(maxima)
        pull = grad_logprobs.masked_fill(ignored, 0.0).div_(shard.temperature)
        spread = None
        if grad_entropy is not None:
            spread = grad_entropy.masked_fill(ignored, 0.0).div_(shard.temperature)
        label_pull = pull.masked_fill(logprobs == -math.inf, 0.0)
        out = logits.detach() if shard.reuse_logits else torch.empty_like(logits)
        _write_gradient(out, logits, labels, (maxima, log_s0, centre), (pull, label_pull, spread), shard)
        return out, None, None


def _shard_sums(logits: Tensor, labels: Tensor, shard: _Shard) -> Tensor:
    """[T, 4 or 6]: m, s0, s1, t, [s2, s3] of this shard's real columns; t is -inf if the label is elsewhere.

    A row without a finite logit, as in a shard of padding, gets the lowest finite m and zero sums.
    """
    dtype = _compute_dtype(logits)
    lowest = torch.finfo(dtype).min
    sums = logits.new_zeros(logits.shape[0], 6 if shard.second_moments else 4, dtype=dtype)
    sums[:, 0] = lowest
    sums[:, 3] = -math.inf
    if shard.valid == 0:
        return sums
    column, is_here = shard.label_columns(labels)
    sums[:, 3] = logits.gather(1, column).squeeze(1).to(dtype).masked_fill_(~is_here, -math.inf)
    real = logits[:, : shard.valid]
    for rows, u, e in _chunks(real, shard.chunk_tokens):
        maxima = real[rows].amax(-1).to(dtype).clamp_(min=lowest)
        _centre(real[rows], maxima, shard.temperature, out=u)
        torch.exp(u, out=e)
        sums[rows, 0] = maxima
        sums[rows, 1] = e.sum(-1)
        sums[rows, 2] = u.mul_(e).sum(-1)
        if shard.second_moments:
            sums[rows, 5] = u.mul_(e).sum(-1)
            sums[rows, 4] = e.mul_(e).sum(-1)
    return sums


def _gather(sums: Tensor, shard: _Shard) -> Tensor:
    """[ranks, T, 4 or 6] in rank order, on every rank; the one collective."""
    if shard.world_size == 1:
        return sums[None]
    gathered = sums.new_empty(shard.world_size * sums.shape[0], sums.shape[1])
    dist.all_gather_into_tensor(gathered, sums, group=shard.group)
    return gathered.view(shard.world_size, *sums.shape)


def _merge(gathered: Tensor, temperature: float) -> list[Tensor]:
    """[T] tensors of the whole row: m, ln s0, c, label logit, and sum p^2, B if s2, s3 were gathered."""
    shard_max, s0, s1, label_logits, *second = gathered.unbind(-1)
    maxima = shard_max.amax(0)
    shift = (shard_max - maxima).div_(temperature).clamp_(min=FLOOR)
    scale = shift.exp()
    total = (scale * s0).sum(0)
    centre = (scale * (s1 + shift * s0)).sum(0) / total
    merged = [maxima, total.log(), centre, label_logits.amax(0)]
    if second:
        s2, s3 = second
        scale = scale.square()
        sum_p2 = (scale * s2).sum(0) / total.square()
        sum_p2_u = (scale * (s3 + shift * s2)).sum(0) / total.square()
        merged += [sum_p2, sum_p2_u - centre * sum_p2]
    return merged


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    row: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor | None],
    shard: _Shard,
) -> None:
    """Write gl (1[j=a] - p_j) - gh p_j (u_j - c) to out, which may be the logits; padding columns become 0.

    row: m, ln s0, c. grads, divided by the temperature: gl, gl at the label, gh (None is 0). All are [T].
    """
    out[:, shard.valid :] = 0
    if shard.valid == 0:
        return
    maxima, log_s0, centre = row
    pull, label_pull, spread = grads
    column, is_here = shard.label_columns(labels)
    label_pull = label_pull.masked_fill(~is_here, 0.0)
    real = logits[:, : shard.valid]
    for rows, grad, weight in _chunks(real, shard.chunk_tokens):
        u = _centre(real[rows], maxima[rows], shard.temperature, out=grad)
        minus_pull = -pull[rows, None]
        if spread is not None:
            torch.sub(u, centre[rows, None], out=weight)
            torch.addcmul(minus_pull, weight, spread[rows, None], value=-1, out=weight)
        u.sub_(log_s0[rows, None]).exp_()
        grad.mul_(minus_pull if spread is None else weight)
        grad.scatter_add_(1, column[rows], label_pull[rows, None])
        out[rows, : shard.valid] = grad


def _chunks(logits: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row ranges of at most chunk_tokens, each with two scratch buffers of its shape in the compute dtype."""
    total, width = logits.shape
    scratch = logits.new_empty(2, min(chunk_tokens, total), width, dtype=_compute_dtype(logits))
    for first in range(0, total, chunk_tokens):
        size = min(chunk_tokens, total - first)
        yield slice(first, first + size), scratch[0, :size], scratch[1, :size]


def _centre(logits: Tensor, maxima: Tensor, temperature: float, *, out: Tensor) -> Tensor:
    """u = (z - m) / temperature, at least FLOOR, in out. Subtracting first keeps large logits exact."""
    torch.sub(logits, maxima[:, None], out=out)
    if temperature != 1.0:
        out.div_(temperature)
    return out.clamp_(min=FLOOR)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _require(is_met: bool, message: str) -> None:
    if not is_met:
        raise ValueError(message)


def _check_inputs(logits: Tensor, labels: Tensor, temperature: float, chunk_tokens: int | None) -> None:
    rule = "must be bf16, fp16, fp32 or fp64. Pass logits, not ids."
    _require(logits.dtype in LOGIT_DTYPES, f"logits.dtype={logits.dtype} {rule}")
    rule = "must be [T, V_local]. Use logits.flatten(0, -2)."
    _require(logits.dim() == 2, f"logits.shape={tuple(logits.shape)} {rule}")
    rule = f"must be ({logits.shape[0]},), one label for each row of logits. Use labels.flatten()."
    _require(labels.shape == logits.shape[:1], f"labels.shape={tuple(labels.shape)} {rule}")
    rule = "must be torch.int64. Use labels.long()."
    _require(labels.dtype == torch.int64, f"labels.dtype={labels.dtype} {rule}")
    rule = "must be positive and finite. Use 1.0 for no scaling."
    _require(0.0 < temperature < math.inf, f"temperature={temperature} {rule}")
    rule = "must be at least 1. Use None for the default."
    _require(chunk_tokens is None or chunk_tokens >= 1, f"chunk_tokens={chunk_tokens} {rule}")


def _world_and_rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if group is None:
        return 1, 0
    rank = dist.get_rank(group)
    rule = f"must contain this rank, global rank {dist.get_rank()}. Pass this rank's tensor-parallel group."
    _require(rank >= 0, f"group={group} {rule}")
    return dist.get_world_size(group), rank


def _check_vocabulary(labels: Tensor, vocab_size: int, width: int, world_size: int) -> None:
    rule = f"must be from 1 to shard width * ranks = {width} * {world_size}. Pass the true vocabulary size."
    _require(1 <= vocab_size <= width * world_size, f"vocab_size={vocab_size} {rule}")
    is_wrong = (labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))
    if is_wrong.any():
        first = int(is_wrong.nonzero()[0])
        raise ValueError(
            f"labels[{first}]={int(labels[first])} must be in [0, vocab_size={vocab_size}) or {IGNORED}. "
            f"Pass global token ids, and {IGNORED} where there is nothing to predict."
        )
