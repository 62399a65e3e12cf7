"""A small dumped step with real statistics: sequences of uneven length over micro-batches, ranks, updates and epochs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fec.algorithm.thresholds import ThresholdLines
from megatron_fec.rollout_dump import DumpSettings, RolloutDump, step_folder
from megatron_fec.types import IGNORED, BlendWeights, MicroBatch, TokenStats
from megatron_fec.vocab_parallel.token_stats import token_stats

VOCABULARY, PROMPT, GROUP = 37, 3, 4
LENGTHS = (5, 9, 1, 12, 7, 3, 8, 4)  # response tokens, by sequence id
# Sequence ids by [update of an epoch][rank][micro-batch]; the last rank of the second update has nothing to train on.
PLAN = (
    (((7, 2), (0,)), ((4,), ())),
    (((1, 6), (3, 5)), ((), ())),
)
EPOCHS = 2
TOKENS = EPOCHS * sum(LENGTHS)
SETTINGS = DumpSettings(
    step=10,
    parts=2,
    group_size=GROUP,
    policy_loss="clip",
    options={"dual_clip": 1.5},
    schedule="did",
    weights=BlendWeights(upper=0.75, lower=0.1),
    lines=ThresholdLines(eps_std=0.15, upper=(-0.2, 0.45), lower=(-0.1, 0.28)),
    aggregation="token_mean",
    log_ratio_clamp=20.0,
    max_response_tokens=16,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One micro-batch as the trainer saw it."""

    update: int
    epoch: int
    seed: int
    rank: int
    micro_batch: MicroBatch
    stats: TokenStats
    logits: Tensor  # that stats were computed from, a leaf


def trained_step() -> list[Trained]:
    """All micro-batches in the order of training; later updates have moved further from the old log-probs."""
    found = []
    for epoch in range(EPOCHS):
        for number, ranks in enumerate(PLAN):
            update = epoch * len(PLAN) + number
            for rank, micro_batches in enumerate(ranks):
                for ids in micro_batches:
                    micro_batch, stats, logits = _micro_batch(ids, drift=0.25 * update)
                    found.append(
                        Trained(
                            update=update,
                            epoch=epoch,
                            seed=1000 + update,
                            rank=rank,
                            micro_batch=micro_batch,
                            stats=stats,
                            logits=logits,
                        )
                    )
    return found


def write_dump(dumps: Path, trained: list[Trained], **settings: Any) -> Path:
    """The step folder, one part a rank."""
    changed = replace(SETTINGS, **settings)
    for rank in range(changed.parts):
        with RolloutDump(dumps, part=rank, settings=changed) as dump:
            for one in trained:
                if one.rank == rank:
                    dump.add(
                        update=one.update,
                        epoch=one.epoch,
                        seed=one.seed,
                        micro_batch=one.micro_batch,
                        stats=one.stats,
                    )
    return step_folder(dumps, changed.step)


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _micro_batch(ids: tuple[int, ...], *, drift: float) -> tuple[MicroBatch, TokenStats, Tensor]:
    """Sequences end to end, then a padding sequence of two tokens; every sequence has the same logits at each update."""
    columns: dict[str, list[Tensor]] = {}
    for i in ids:
        length = PROMPT + LENGTHS[i] - 1  # positions that are fed
        logits = 2.5 * _randn(i, length, VOCABULARY)
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(i))[:, 0]
        mask = torch.arange(length) >= PROMPT - 1
        for name, values in {
            "labels": tokens,
            "position_ids": torch.arange(length),
            "sequence_ids": torch.full((length,), i),
            "response_mask": mask,
            "response_starts": torch.arange(length) == PROMPT - 1,
            "response_lengths": mask * LENGTHS[i],
            "advantages": mask * (-1.0) ** i * (0.4 + 0.1 * i),
            "old_logits": logits,
            "logits": logits + drift * _randn(100 + i, length, VOCABULARY),
            "noise": 0.1 * _randn(200 + i, length).abs(),
        }.items():
            columns.setdefault(name, []).append(values)
    padding: dict[str, Tensor] = {
        "labels": torch.full((2,), IGNORED),
        "position_ids": torch.arange(2),
        "sequence_ids": torch.full((2,), -1),
        "response_mask": torch.zeros(2, dtype=torch.bool),
        "response_starts": torch.zeros(2, dtype=torch.bool),
        "response_lengths": torch.zeros(2, dtype=torch.int64),
        "advantages": torch.zeros(2),
        "old_logits": torch.zeros(2, VOCABULARY),
        "logits": torch.zeros(2, VOCABULARY),
        "noise": torch.zeros(2),
    }
    flat = {name: torch.cat([*columns.get(name, []), end]) for name, end in padding.items()}
    old = token_stats(flat["old_logits"], flat["labels"])
    update = next(u for u in PLAN if any(ids in rank for rank in u))
    micro_batch = MicroBatch(
        tokens=flat["labels"].clamp(min=0),
        labels=flat["labels"],
        position_ids=flat["position_ids"],
        cu_seqlens=torch.tensor([0]),
        max_seqlen=0,
        sequence_ids=flat["sequence_ids"],
        response_mask=flat["response_mask"],
        response_starts=flat["response_starts"],
        response_lengths=flat["response_lengths"],
        update_lengths=torch.tensor([LENGTHS[i] for rank in update for batch in rank for i in batch]),
        advantages=flat["advantages"],
        rollout_logprobs=torch.where(flat["response_mask"], old.logprobs - flat["noise"], 0.0),
        old_logprobs=old.logprobs,
        old_entropy=old.entropy,
    )
    logits = flat["logits"].requires_grad_()
    return micro_batch, token_stats(logits, flat["labels"], second_moments=True), logits
