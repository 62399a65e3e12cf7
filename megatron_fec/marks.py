"""What a loss chooses over a whole update, computed before the update's training pass and put into the micro-batches.

Which tokens Clip-Cov or KL-Cov choose then does not depend on how the update is cut into micro-batches or spread over
ranks. It costs one forward pass more for each update, and one gather of seven numbers a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds
from megatron_fec.policy.step import Policy, token_statistics
from megatron_fec.types import BlendWeights, MicroBatch, TokenStats, UpdateTokens

POSITIONS = 1 << 32  # more than a sequence has: key = sequence id * POSITIONS + position


def mark_update(
    policy: Policy,
    update: Sequence[MicroBatch],
    marks: Callable[[UpdateTokens], Tensor],
    *,
    weights: BlendWeights,
    lines: ThresholdLines,
    seed: int,
) -> list[MicroBatch]:
    """The micro-batches with marks; every rank of the last stage computes those of all tokens, then keeps its own."""
    pairs = token_statistics(policy, update, second_moments=True)
    if not policy.layout.is_last_stage:
        return [micro_batch for micro_batch, _ in pairs]
    parts = [_response_tokens(micro_batch, stats) for micro_batch, stats in pairs if stats is not None]
    own_keys = torch.cat([keys for keys, _ in parts])
    keys, values = _gathered(own_keys, torch.cat([values for _, values in parts]), policy.layout.data_group)
    logprobs, old_logprobs, advantages, entropy, alignment = values.unbind(1)
    tokens = UpdateTokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        entropy=entropy,
        alignment=alignment,
        bounds=clip_bounds(logprobs.exp(), weights, lines=lines),
        sequence_ids=keys // POSITIONS,
        seed=seed,
    )
    own = marks(tokens)[torch.searchsorted(keys, own_keys)]
    shares = own.split([keys.numel() for keys, _ in parts])
    return [_with_marks(micro_batch, share) for (micro_batch, _), share in zip(pairs, shares, strict=True)]


def _response_tokens(micro_batch: MicroBatch, stats: TokenStats) -> tuple[Tensor, Tensor]:
    """Keys [N] and values [N, 5] of the response tokens, in host memory."""
    assert micro_batch.old_logprobs is not None and stats.alignment is not None
    mask = micro_batch.response_mask
    keys = micro_batch.sequence_ids[mask] * POSITIONS + micro_batch.position_ids[mask]
    columns = (
        stats.logprobs,
        micro_batch.old_logprobs,
        micro_batch.advantages,
        stats.entropy,
        stats.alignment,
    )
    return keys.cpu(), torch.stack([column.detach()[mask] for column in columns], 1).cpu()


def _gathered(keys: Tensor, values: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Those of all ranks, by key; the same bits on every rank."""
    shares: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(shares, (keys.numpy(), values.numpy()), group=group)
    keys = torch.cat([torch.from_numpy(share[0]) for share in shares])
    values = torch.cat([torch.from_numpy(share[1]) for share in shares])
    keys, order = keys.sort()
    return keys, values[order]


def _with_marks(micro_batch: MicroBatch, marks: Tensor) -> MicroBatch:
    mask = micro_batch.response_mask
    filled = torch.zeros_like(micro_batch.advantages)
    filled[mask] = marks.to(device=filled.device, dtype=filled.dtype)
    return replace(micro_batch, marks=filled)
