"""Samples -> micro-batches: which rank trains on which sequence, and how sequences lie end to end in memory.

A sequence of n tokens is fed as n - 1 positions, tokens[:-1], with labels tokens[1:]: no position is spent on a token
after which nothing is predicted. Every rank computes the plan of the whole update, then builds its own tensors; labels
are shifted before a sequence is split over context ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fec.context_split import context_indices, sequence_multiple
from megatron_fec.types import IGNORED, MicroBatch, SampleGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLayout:
    """Who packs, and how long a micro-batch may be."""

    data_parallel_rank: int
    data_parallel_size: int
    micro_batch_tokens: int  # of all sequences of a micro-batch, before the rounding to `multiple`
    multiple: int  # a rank's tokens are a multiple of it (tensor ranks under sequence parallelism)
    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    micro_batch_multiple: int = (
        1  # an update has a multiple of it micro-batches, empty ones if there is no other way
    )
    is_full_length: bool = (
        False  # every micro-batch is padded to micro_batch_tokens: all have one length in all updates
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    sequence_id: int
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    logprobs: Sequence[float]  # one per response token

    @property
    def length(self) -> int:
        """Positions that are fed."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


def pack(
    groups: Sequence[SampleGroup], *, layout: PackLayout, prompts_per_update: int, seed: int
) -> list[list[MicroBatch]]:
    """This rank's micro-batches, [update][micro-batch]; T of them is this context rank's part.

    An update holds as many samples as `prompts_per_update` prompts have, drawn without replacement from the whole step:
    siblings in one update cancel part of each other's gradient, and fewer tokens reach a clip bound
    (docs/equations.md). In one update all ranks have equally many micro-batches, all of one length T: the pipeline
    schedule sends one shape. sequence_ids are p * G + g, in every layout. Advantages are 0 until `with_sample_values`:
    rewards may still be on their way.
    """
    if len(groups) % prompts_per_update:
        raise ValueError(
            f"algorithm.prompts_per_update={prompts_per_update} must divide the {len(groups)} prompts of a step. "
            f"Use a divisor of {len(groups)}."
        )
    pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
    sequences = [
        _Sequence(
            sequence_id=number,
            prompt_ids=prompt.token_ids,
            response_ids=sample.token_ids,
            logprobs=sample.logprobs,
        )
        for number, (prompt, sample) in enumerate(pairs)
    ]
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    size = len(sequences) // (len(groups) // prompts_per_update)
    return [
        _pack_update([sequences[i] for i in order[start : start + size]], layout)
        for start in range(0, len(sequences), size)
    ]


def with_sample_values(updates: Sequence[Sequence[MicroBatch]], **values: Tensor) -> list[list[MicroBatch]]:
    """The micro-batches of `pack` with a value of each sample at its response tokens, such as advantages=.

    values: [P, G] for fields of MicroBatch, row i of the i-th group given to `pack`.
    """
    flat = {name: value.float().reshape(-1) for name, value in values.items()}  # by sequence id

    def fill(batch: MicroBatch) -> MicroBatch:
        # Padding has sequence id -1 and takes the last entry, which the mask drops.
        filled = {
            name: value.to(batch.tokens.device)[batch.sequence_ids].masked_fill(~batch.response_mask, 0.0)
            for name, value in flat.items()
        }
        return replace(batch, **filled)

    return [[fill(batch) for batch in update] for update in updates]


def pack_demonstrations(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, layout: PackLayout
) -> list[MicroBatch]:
    """This rank's micro-batches of one supervised update over (prompt ids, response ids): advantage 1, log-prob 0."""
    sequences = [
        _Sequence(
            sequence_id=number,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            logprobs=[0.0] * len(response_ids),
        )
        for number, (prompt_ids, response_ids) in enumerate(pairs)
    ]
    batches = _pack_update(sequences, layout)
    return [replace(batch, advantages=batch.response_mask.float()) for batch in batches]


def _pack_update(sequences: Sequence[_Sequence], layout: PackLayout) -> list[MicroBatch]:
    """This rank's micro-batches of one update."""
    lengths = [_padded_length(sequence, layout) for sequence in sequences]
    plan = _plan(
        lengths,
        ranks=layout.data_parallel_size,
        budget=layout.micro_batch_tokens,
        multiple=layout.micro_batch_multiple,
    )
    longest = max(sum(lengths[i] for i in chosen) for bins in plan for chosen in bins)
    if layout.is_full_length:
        longest = layout.micro_batch_tokens
    size = layout.context_parallel_size
    update_lengths = torch.tensor([len(sequence.response_ids) for sequence in sequences])
    total = _round_up(max(1, longest), math.lcm(size * layout.multiple, sequence_multiple(size)))
    return [
        replace(
            _micro_batch([sequences[i] for i in chosen], [lengths[i] for i in chosen], total, layout),
            update_lengths=update_lengths,
        )
        for chosen in plan[layout.data_parallel_rank]
    ]


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _padded_length(sequence: _Sequence, layout: PackLayout) -> int:
    """Positions that the sequence takes, with its own padding under context parallelism."""
    if not sequence.prompt_ids or not sequence.response_ids:
        raise ValueError(
            f"sequence {sequence.sequence_id} has {len(sequence.prompt_ids)} prompt and {len(sequence.response_ids)} "
            "response tokens; each needs at least 1. Filter empty prompts and responses."
        )
    length = _round_up(sequence.length, sequence_multiple(layout.context_parallel_size))
    if length > layout.micro_batch_tokens:
        raise ValueError(
            f"policy.micro_batch_tokens={layout.micro_batch_tokens} must hold the longest sequence, which has "
            f"{length} positions. Raise it, or lower rollout.max_response_tokens."
        )
    return length


def _plan(lengths: Sequence[int], *, ranks: int, budget: int, multiple: int) -> list[list[list[int]]]:
    """Indices of sequences, [rank][micro-batch]: tokens balanced over ranks, then over the fewest micro-batches that
    fit the budget on every rank, a multiple of `multiple`.

    Two ranks differ by at most the longest sequence. A rank with few sequences may get empty micro-batches.
    """
    assignment = _balance(range(len(lengths)), lengths, num_bins=ranks)
    count = max(1, *(-(-sum(lengths[i] for i in chosen) // budget) for chosen in assignment))
    while True:  # ends: with as many bins as sequences each is alone, and fits
        bins_of_a_rank = _round_up(count, multiple)
        plan = [_balance(chosen, lengths, num_bins=bins_of_a_rank) for chosen in assignment]
        if all(sum(lengths[i] for i in chosen) <= budget for bins in plan for chosen in bins):
            return plan
        count += 1


def _balance(indices: Sequence[int], lengths: Sequence[int], *, num_bins: int) -> list[list[int]]:
    """Longest first, each into the least full bin; ties by index, so that all ranks agree."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        least = loads.index(min(loads))
        bins[least].append(i)
        loads[least] += lengths[i]
    return bins


def _micro_batch(
    sequences: Sequence[_Sequence], lengths: Sequence[int], total: int, layout: PackLayout
) -> MicroBatch:
    """This context rank's part of the sequences end to end, each padded to its length, and a last one of padding."""
    tokens, labels = torch.zeros(total, dtype=torch.int64), torch.full((total,), IGNORED, dtype=torch.int64)
    sequence_ids = torch.full((total,), -1, dtype=torch.int64)
    response_mask, response_starts = torch.zeros(2, total, dtype=torch.bool)
    response_lengths = torch.zeros(total, dtype=torch.int64)
    logprobs = torch.zeros(total)
    start = 0
    for sequence, length in zip(sequences, lengths, strict=True):
        end = start + sequence.length
        first = start + len(sequence.prompt_ids) - 1  # the index that predicts the first response token
        token_ids = torch.tensor([*sequence.prompt_ids, *sequence.response_ids], dtype=torch.int64)
        tokens[start:end], labels[start:end] = token_ids[:-1], token_ids[1:]
        sequence_ids[start:end] = sequence.sequence_id
        response_mask[first:end] = True
        response_starts[first] = True
        response_lengths[first:end] = len(sequence.response_ids)
        logprobs[first:end] = torch.tensor(sequence.logprobs)
        start += length
    lengths = [*lengths, total - start] if start < total else lengths
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mine = context_indices(cu_seqlens, rank=layout.context_parallel_rank, size=layout.context_parallel_size)
    return MicroBatch(
        tokens=tokens[mine],
        labels=labels[mine],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[mine],
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        sequence_ids=sequence_ids[mine],
        response_mask=response_mask[mine],
        response_starts=response_starts[mine],
        response_lengths=response_lengths[mine],
        update_lengths=torch.empty(0, dtype=torch.int64),  # of the update, which its caller knows
        advantages=torch.zeros(len(mine)),
        rollout_logprobs=logprobs[mine],
    )
