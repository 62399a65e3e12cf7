"""Bad calls of token_stats: a ValueError with setting, value, rule and remedy, on every rank alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from test_token_stats import VOCAB, make_inputs
from torch import Tensor

from megatron_fec.vocab_parallel.token_stats import token_stats

LOGITS, LABELS = make_inputs()


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (LOGITS.long(), LABELS, {}, r"logits\.dtype=torch\.int64 must be bf16, .* fp64\. Pass logits"),
        (LOGITS.to(torch.complex64), LABELS, {}, r"logits\.dtype=torch\.complex64 must be bf16"),
        (
            LOGITS[None],
            LABELS,
            {},
            r"logits\.shape=\(1, 11, 40\) must be \[T, V_local\] .* Use logits\.flatten",
        ),
        (
            LOGITS,
            LABELS[1:],
            {},
            r"labels\.shape=\(10,\) must be \(11,\), one label for each row\. Use labels\.flatten",
        ),
        (LOGITS, LABELS[None], {}, r"labels\.shape=\(1, 11\) must be \(11,\)"),
        (LOGITS, LABELS.int(), {}, r"labels\.dtype=torch\.int32 must be torch\.int64\. Use labels\.long"),
        (
            LOGITS,
            LABELS.clone().index_fill_(0, torch.tensor([2]), 37),
            {},
            r"labels\[2\]=37 on rank 0 of 1 must be in \[0, vocab_size=37\)",
        ),
        (
            LOGITS,
            LABELS.clone().index_fill_(0, torch.tensor([7]), -1),
            {},
            r"labels\[7\]=-1 .* or -100\. Pass global",
        ),
        (
            LOGITS,
            LABELS,
            {"vocab_size": 41},
            r"vocab_size=41 must be from 1 to shard width \* ranks = 40 \* 1\. Pass",
        ),
        (LOGITS, LABELS, {"vocab_size": 0}, r"vocab_size=0 must be from 1 to"),
        (
            LOGITS,
            LABELS,
            {"temperature": 0.0},
            r"temperature=0\.0 must be finite and at least 1e-6\. Use 1\.0",
        ),
        (LOGITS, LABELS, {"temperature": -1.0}, r"temperature=-1\.0 must be finite"),
        (LOGITS, LABELS, {"temperature": math.nan}, r"temperature=nan must be finite"),
        (LOGITS, LABELS, {"temperature": math.inf}, r"temperature=inf must be finite"),
        (LOGITS, LABELS, {"chunk_tokens": 0}, r"chunk_tokens=0 must be at least 1\. Use None"),
    ],
)
def test_errors(logits: Tensor, labels: Tensor, options: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"vocab_size": VOCAB} | options
    with pytest.raises(ValueError, match=message):
        token_stats(logits, labels, **settings)


def errors_on_rank(rank: int) -> list[str]:
    """The message of each bad call, on this rank; a rank that raised alone would leave the other one waiting."""
    messages = []
    one_bad_label = LABELS + 100 * rank  # on rank 1 only
    narrow = LOGITS[:, : 40 - 4 * rank]
    for logits, labels, options in [
        (LOGITS, LABELS, {"vocab_size": 81}),
        (LOGITS, LABELS, {"vocab_size": 77 + rank}),
        (LOGITS, one_bad_label, {"vocab_size": 77}),
        (narrow, LABELS, {"vocab_size": 77}),
        (narrow, LABELS, {}),
        (LOGITS.long(), LABELS, {}),
        (LOGITS, LABELS[1:], {}),
    ]:
        with pytest.raises(ValueError) as caught:
            token_stats(logits, labels, group=dist.group.WORLD, **options)
        messages.append(str(caught.value))
    token_stats(LOGITS, LABELS, group=dist.group.WORLD)  # and nothing is left in the way of the next call
    return messages


def test_every_rank_raises_the_same_error() -> None:
    first, second = run_on_ranks(2, errors_on_rank, deadline=20.0)
    assert first == second
    for message, expected in zip(
        first,
        [
            "vocab_size=81 must be from 1 to shard width * ranks = 40 * 2. Pass the true",
            "vocab_size=[77, 78] by rank must be one size. Pass the true",
            "labels[0]=100 on rank 1 of 2 must be in [0, vocab_size=77) or -100. Pass global token ids",
            "logits.shape[1]=[40, 36] by rank must be one width, the padded vocabulary / 2. Pad the vocabulary",
            "logits.shape[1]=[40, 36] by rank must be one width, the padded vocabulary / 2. Pad the vocabulary",
            "logits.dtype=torch.int64 must be bf16",
            "labels.shape=(10,) must be (11,), one label for each row",
        ],
        strict=True,
    ):
        assert expected in message


def error_outside_the_group(rank: int) -> str:
    only_rank_0: Any = dist.new_group([0])
    if rank == 0:
        return ""
    with pytest.raises(ValueError) as caught:
        token_stats(LOGITS, LABELS, group=only_rank_0)
    return str(caught.value)


def test_a_group_without_this_rank_is_refused() -> None:
    message = run_on_ranks(2, error_outside_the_group, deadline=20.0)[1]
    assert "must contain this rank, global rank 1. Pass this rank's tensor-parallel group" in message
