"""Samples -> micro-batches: which rank trains on which sequence, and how sequences lie end to end in memory.

A sequence of n tokens is fed as n - 1 positions, tokens[:-1], with labels tokens[1:]: no position is spent on a token
after which nothing is predicted. Every rank computes the plan of the whole update, then builds its own tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fec.types import MicroBatch, SampleGroup

IGNORED = -100  # label of a position without one


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLayout:
    """Who packs, and how long a micro-batch may be."""

    data_parallel_rank: int
    data_parallel_size: int
    micro_batch_tokens: int  # of all sequences of a micro-batch, before the rounding to `multiple`
    multiple: int  # a micro-batch's length is a multiple of it (tensor ranks under sequence parallelism)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    sequence_id: int
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    logprobs: Sequence[float]  # one per response token

    @property
    def length(self) -> int:
        """Positions that the sequence takes."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


def pack(
    groups: Sequence[SampleGroup], *, layout: PackLayout, prompts_per_update: int, seed: int
) -> list[list[MicroBatch]]:
    """This data-parallel rank's micro-batches, [update][micro-batch].

    An update holds as many samples as `prompts_per_update` prompts have, drawn without replacement from the whole step:
    siblings in one update cancel part of each other's gradient, and fewer tokens reach a clip bound
    (docs/equations.md). In one update all ranks have equally many micro-batches, all of one length T: the pipeline
    schedule sends one shape. sequence_ids are p * G + g, in every layout. Advantages are 0 until `with_advantages`:
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


def with_advantages(updates: Sequence[Sequence[MicroBatch]], advantages: Tensor) -> list[list[MicroBatch]]:
    """The micro-batches of `pack` with each sample's advantage at its response tokens.

    advantages: [P, G], row i of the i-th group given to `pack`.
    """
    flat = advantages.float().reshape(-1)  # by sequence id

    def fill(batch: MicroBatch) -> MicroBatch:
        # Padding has sequence id -1 and takes the last entry, which the mask drops.
        values = flat.to(batch.tokens.device)[batch.sequence_ids]
        return replace(batch, advantages=values.masked_fill(~batch.response_mask, 0.0))

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
    for sequence in sequences:
        _check(sequence, layout)
    lengths = [sequence.length for sequence in sequences]
    plan = _plan(lengths, ranks=layout.data_parallel_size, budget=layout.micro_batch_tokens)
    longest = max(sum(lengths[i] for i in chosen) for bins in plan for chosen in bins)
    total = max(1, -(-longest // layout.multiple)) * layout.multiple
    mine = plan[layout.data_parallel_rank]
    return [_micro_batch([sequences[i] for i in chosen], total) for chosen in mine]


def _check(sequence: _Sequence, layout: PackLayout) -> None:
    if not sequence.prompt_ids or not sequence.response_ids:
        raise ValueError(
            f"sequence {sequence.sequence_id} has {len(sequence.prompt_ids)} prompt and {len(sequence.response_ids)} "
            "response tokens; each needs at least 1. Filter empty prompts and responses."
        )
    if sequence.length > layout.micro_batch_tokens:
        raise ValueError(
            f"policy.micro_batch_tokens={layout.micro_batch_tokens} must hold the longest sequence, which has "
            f"{sequence.length} positions. Raise it, or lower rollout.max_response_tokens."
        )


def _plan(lengths: Sequence[int], *, ranks: int, budget: int) -> list[list[list[int]]]:
    """Indices of sequences, [rank][micro-batch]: tokens balanced over ranks, then over the fewest micro-batches that
    fit the budget on every rank.

    Two ranks differ by at most the longest sequence. A rank with few sequences may get empty micro-batches.
    """
    assignment = _balance(range(len(lengths)), lengths, num_bins=ranks)
    count = max(1, *(-(-sum(lengths[i] for i in chosen) // budget) for chosen in assignment))
    while True:  # ends: with as many bins as sequences each is alone, and fits
        plan = [_balance(chosen, lengths, num_bins=count) for chosen in assignment]
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


def _micro_batch(sequences: Sequence[_Sequence], total: int) -> MicroBatch:
    """The sequences end to end, and one of padding up to `total` tokens."""
    lengths = [sequence.length for sequence in sequences]
    used = sum(lengths)
    tokens, labels = torch.zeros(total, dtype=torch.int64), torch.full((total,), IGNORED, dtype=torch.int64)
    sequence_ids = torch.full((total,), -1, dtype=torch.int64)
    response_mask = torch.zeros(total, dtype=torch.bool)
    logprobs = torch.zeros(total)
    start = 0
    for sequence, length in zip(sequences, lengths, strict=True):
        end = start + length
        first = start + len(sequence.prompt_ids) - 1  # the index that predicts the first response token
        token_ids = torch.tensor([*sequence.prompt_ids, *sequence.response_ids], dtype=torch.int64)
        tokens[start:end], labels[start:end] = token_ids[:-1], token_ids[1:]
        sequence_ids[start:end] = sequence.sequence_id
        response_mask[first:end] = True
        logprobs[first:end] = torch.tensor(sequence.logprobs)
        start = end
    if used < total:
        lengths = [*lengths, total - used]
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        sequence_ids=sequence_ids,
        response_mask=response_mask,
        advantages=torch.zeros(total),
        rollout_logprobs=logprobs,
    )
