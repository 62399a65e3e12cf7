"""From the sums of each rank's blocks to the statistics of whole rows: the one collective, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fec.types import IGNORED
from megatron_fec.vocab_parallel.shard import FLOOR, VocabLayout, require

NOTE = 4  # numbers that a rank adds to its sums, so that all ranks can judge the call


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStats:
    """[T] tensors in the compute dtype, the same bits on every rank; u = (z - m) / temperature."""

    maxima: Tensor  # m
    log_s0: Tensor  # ln sum e^u
    centre: Tensor  # c = sum u e^u / sum e^u
    logprobs: Tensor  # ln p of the label, 0 where it is ignored
    entropy: Tensor
    second: tuple[Tensor, ...]  # sum p^2, B and the alignment, or nothing


def merge_sums(sums: Tensor, labels: Tensor, *, layout: VocabLayout, temperature: float) -> RowStats:
    """The statistics of all rows from this rank's [T, blocks, 4 or 6] sums (token_stats names them).

    One all-gather; the blocks are added in the order of the vocabulary. Raises ValueError on every rank if the widths do
    not make up the vocabulary, the vocabulary sizes differ, or a label of any rank is out of range.
    """
    gathered, notes = _gather(sums, labels, layout)
    maxima, total, s1, label_logits, *second = add_blocks(gathered, temperature).unbind(-1)
    centre = s1 / total
    log_s0 = total.log()
    logprobs = (label_logits - maxima).div_(temperature).sub_(log_s0)
    entropy = log_s0 - centre
    moments = ()
    if second:
        s2, s3 = second
        sum_p2 = s2 / total.square()
        baseline = s3 / total.square() - centre * sum_p2
        own = (logprobs.exp() * (logprobs + entropy)).masked_fill_(logprobs == -math.inf, 0.0)
        moments = (sum_p2, baseline, (baseline - own).masked_fill_(labels == IGNORED, 0.0))
    _check_notes(notes.tolist(), layout.ranks)  # last, because on a GPU it waits for all of the above
    return RowStats(
        maxima=maxima,
        log_s0=log_s0,
        centre=centre,
        logprobs=logprobs.masked_fill_(labels == IGNORED, 0.0),
        entropy=entropy,
        second=moments,
    )


def add_blocks(sums: Tensor, temperature: float) -> Tensor:
    """[T, 4 or 6] of the columns of all blocks together, from [blocks, T, 4 or 6], moved to the common maximum."""
    block_max, s0, s1, label_logits, *second = sums.unbind(-1)
    maxima = block_max.amax(0)
    shift = (block_max - maxima).div_(temperature).clamp_(min=FLOOR)
    scale = shift.exp()
    added = [
        maxima,
        (scale * s0).sum(0),
        (scale * (s1 + shift * s0)).sum(0),
        label_logits.amax(0),
    ]
    if second:
        s2, s3 = second
        scale = scale.square()
        added += [(scale * s2).sum(0), (scale * (s3 + shift * s2)).sum(0)]
    return torch.stack(added, -1)


def _gather(sums: Tensor, labels: Tensor, layout: VocabLayout) -> tuple[Tensor, Tensor]:
    """[ranks * blocks, T, 4 or 6] in the order of the vocabulary, and each rank's note, on every rank."""
    mine = torch.cat([sums.flatten(), _note(labels, layout).to(sums.dtype)])
    everyone = mine[None]
    if layout.ranks > 1:
        flat = mine.new_empty(layout.ranks * mine.numel())
        dist.all_gather_into_tensor(flat, mine, group=layout.group)
        everyone = flat.view(layout.ranks, -1)
    floats = everyone[:, :-NOTE].unflatten(1, sums.shape)
    # One layout in memory, so one order of addition.
    return floats.transpose(1, 2).flatten(0, 1).contiguous(), everyone[:, -NOTE:]


def _note(labels: Tensor, layout: VocabLayout) -> Tensor:
    """[4] int64: shard width, vocabulary size, index of the first label out of range or -1, that label."""
    is_wrong = (labels != IGNORED) & ((labels < 0) | (labels >= layout.vocab_size))
    # With one more entry than labels, which is wrong: its index is the number of labels.
    first = torch.cat([is_wrong, is_wrong.new_ones(1)]).int().argmax()[None]
    label = torch.cat([labels, labels.new_zeros(1)]).gather(0, first)
    width, size = (labels.new_full((1,), n) for n in (layout.shard.width, layout.vocab_size))
    index = first.where(first < len(labels), -1)
    return torch.cat([width, size, index, label.clamp(-(2**24), 2**24)])  # all exact in fp32


def _check_notes(notes: list[list[float]], ranks: int) -> None:
    widths, sizes, indices, labels = ([int(value) for value in column] for column in zip(*notes, strict=True))
    require(
        len(set(widths)) == 1,
        f"logits.shape[1]={widths} by rank must be one width, the padded vocabulary / {ranks}. "
        f"Pad the vocabulary to a multiple of the {ranks} ranks.",
    )
    require(
        len(set(sizes)) == 1,
        f"vocab_size={sizes} by rank must be one size. Pass the true vocabulary size on every rank.",
    )
    require(
        1 <= sizes[0] <= widths[0] * ranks,
        f"vocab_size={sizes[0]} must be from 1 to shard width * ranks = {widths[0]} * {ranks}. "
        "Pass the true vocabulary size.",
    )
    for rank, (index, label) in enumerate(zip(indices, labels, strict=True)):
        require(
            index < 0,
            f"labels[{index}]={label} on rank {rank} of {ranks} must be in [0, vocab_size={sizes[0]}) or {IGNORED}. "
            f"Pass global token ids, and {IGNORED} where there is nothing to predict.",
        )
