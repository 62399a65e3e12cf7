"""Context parallelism beside the update itself (test_layouts.py): the split, packing, sampling and whole steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_fixtures import (
    VOCABULARY,
    advantages,
    assert_same_weights,
    copied_weights,
    fp32,
    make_groups,
    nll_step,
    on_layout,
    pack_for,
    save_model,
)
from ranks import run_on_ranks
from torch import Tensor

from megatron_fec.algorithm.losses import AGGREGATIONS, clipped_surrogate
from megatron_fec.context_split import context_indices, sequence_multiple
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.sampling import sample_responses
from megatron_fec.policy.step import Policy
from megatron_fec.rollout.packing import PackLayout, pack_demonstrations
from megatron_fec.types import ClipBounds, LossInputs, MicroBatch

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


# ---- the split ----


@pytest.mark.parametrize(
    ("starts", "size", "wanted"),
    [
        ([0, 3, 7], 1, [[0, 1, 2, 3, 4, 5, 6]]),
        ([0, 4], 2, [[0, 3], [1, 2]]),
        ([0, 8, 12], 2, [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]),
        ([0, 6, 18], 3, [[0, 5, 6, 7, 16, 17], [1, 4, 8, 9, 14, 15], [2, 3, 10, 11, 12, 13]]),
    ],
)
def test_the_split_chunk_by_chunk(starts: list[int], size: int, wanted: list[list[int]]) -> None:
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    assert [context_indices(cu_seqlens, rank=rank, size=size).tolist() for rank in range(size)] == wanted


def test_a_sequence_that_cannot_be_cut_is_an_error() -> None:
    with pytest.raises(AssertionError, match="a sequence of 6 cannot be cut into 4 chunks"):
        context_indices(torch.tensor([0, 4, 10]), rank=0, size=2)


@pytest.mark.gpu
def test_transformer_engine_splits_in_the_same_way() -> None:
    engine = pytest.importorskip("transformer_engine_torch")
    cu_seqlens = torch.tensor([0, 8, 24, 32], dtype=torch.int32)
    for rank in range(2):
        theirs = engine.thd_get_partitioned_indices(cu_seqlens.cuda(), 32, 2, rank)
        assert theirs.tolist() == context_indices(cu_seqlens, rank=rank, size=2).tolist()


# ---- packing ----


def packed(rank: int, size: int, *, tokens: int = 64, multiple: int = 1) -> list[MicroBatch]:
    layout = PackLayout(
        data_parallel_rank=0,
        data_parallel_size=1,
        micro_batch_tokens=tokens,
        multiple=multiple,
        context_parallel_rank=rank,
        context_parallel_size=size,
    )
    return pack_demonstrations([([5, 6], [7, 8, 9]), ([1], [2, 3, 4, 5, 6, 7])], layout=layout)


def test_two_context_ranks_written_by_hand() -> None:
    (first,), (second,) = packed(0, 2), packed(1, 2)
    assert packed(0, 1)[0].cu_seqlens.tolist() == [0, 6, 10]
    for batch in (first, second):  # 6 and 4 positions become 8 and 4
        assert batch.cu_seqlens.tolist() == [0, 8, 12] and batch.max_seqlen == 8
    # Labels are those of the whole sequence: the one of token 2 is 3, which is on the other rank.
    assert first.tokens.tolist() == [1, 2, 0, 0, 5, 8]
    assert first.labels.tolist() == [2, 3, -100, -100, 6, 9]
    assert first.position_ids.tolist() == [0, 1, 6, 7, 0, 3]
    assert first.sequence_ids.tolist() == [1, 1, -1, -1, 0, 0]
    assert first.response_mask.tolist() == [True, True, False, False, False, True]
    assert first.response_starts.tolist() == [True, False, False, False, False, False]
    assert first.response_lengths.tolist() == [6, 6, 0, 0, 0, 3]
    assert second.tokens.tolist() == [3, 4, 5, 6, 6, 7]
    assert second.labels.tolist() == [4, 5, 6, 7, 7, 8]
    assert second.response_starts.tolist() == [False, False, False, False, True, False]
    assert second.response_lengths.tolist() == [6, 6, 6, 6, 3, 3]
    assert second.advantages.tolist() == [1.0] * 6


@pytest.mark.parametrize(("size", "multiple"), [(2, 1), (2, 2), (2, 3), (2, 4), (3, 2), (4, 4)])
def test_a_ranks_part_has_the_asked_length(size: int, multiple: int) -> None:
    ranks = [packed(rank, size, tokens=32, multiple=multiple) for rank in range(size)]
    for parts in zip(*ranks, strict=True):
        lengths = parts[0].cu_seqlens.diff()
        assert all(int(n) > 0 and int(n) % sequence_multiple(size) == 0 for n in lengths)
        assert {len(part.tokens) for part in parts} == {int(lengths.sum()) // size}
        assert len(parts[0].tokens) % multiple == 0
        for name in (f.name for f in fields(MicroBatch)):
            if isinstance(value := getattr(parts[0], name), Tensor) and name not in (
                "cu_seqlens",
                "update_lengths",
            ):
                assert len(value) == len(parts[0].tokens), name
    labels = [int(n) for rank in ranks for part in rank for n in part.labels if n >= 0]
    assert sorted(labels) == sorted([6, 7, 8, 9, 2, 3, 4, 5, 6, 7])


def test_the_padding_of_a_sequence_must_fit() -> None:
    assert packed(0, 2, tokens=8)
    with pytest.raises(ValueError, match=r"micro_batch_tokens=7 must hold.* 8 positions"):
        packed(0, 2, tokens=7)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_sequence_split_over_ranks_counts_once_with_its_whole_length(aggregation: str) -> None:
    def loss(ranks: Sequence[MicroBatch]) -> tuple[float, int]:
        outputs = [
            clipped_surrogate(
                LossInputs(
                    logprobs=batch.labels.double(),  # any number that belongs to the token
                    old_logprobs=batch.labels.double(),
                    advantages=batch.labels.double(),
                    response_mask=batch.response_mask,
                    bounds=ClipBounds(eps_lower=torch.tensor(0.2), eps_upper=torch.tensor(0.2)),
                    response_starts=batch.response_starts,
                    response_lengths=batch.response_lengths,
                    max_response_tokens=8,
                    aggregation=aggregation,
                )
            )
            for batch in ranks
        ]
        return sum(out.loss_sum.item() for out in outputs), sum(int(out.count) for out in outputs)

    wanted = {
        "token_mean": (-51.0, 9),
        "seq_mean_token_mean": (-27 / 6 - 24 / 3, 2),
        "seq_mean_token_sum": (-51.0, 2),
        "seq_mean_token_sum_norm": (-51.0 / 8, 2),
    }[aggregation]
    for size in (1, 2, 3, 4):
        assert loss([packed(rank, size)[0] for rank in range(size)]) == pytest.approx(wanted, rel=1e-12)


# ---- ranks and sampling ----


def test_a_layout_knows_its_ranks() -> None:
    def job(rank: int) -> tuple[Any, ...]:
        layout = initialize_parallel(fp32(tensor_parallel=2, context_parallel=2), seed=0)
        replicas = torch.distributed.get_process_group_ranks(layout.data_group)
        return layout.context_parallel_rank, layout.data_parallel, layout.reports_metrics, replicas

    assert run_on_ranks(4, job) == [
        (0, 1, True, [0, 2]),
        (0, 1, False, [1, 3]),
        (1, 1, True, [0, 2]),
        (1, 1, False, [1, 3]),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"context_parallel": 2},
        {"context_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
        {"context_parallel": 2, "pipeline_parallel": 2},
    ],
    ids=str,
)
def test_sampling_is_that_of_one_rank_and_training_does_not_notice(
    model_dir: Path, settings: dict[str, Any]
) -> None:
    uniforms = torch.rand(3, 9, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    sample = partial(
        sample_responses, prompts=PROMPTS, uniforms=uniforms, stop_id=VOCABULARY - 1, temperature=1.0
    )

    def updated(policy: Policy, *, samples: bool) -> tuple[Any, dict[str, Tensor]]:
        (batches,) = pack_for(policy, make_groups())
        nll_step(policy, batches)
        responses = sample(policy) if samples else None
        nll_step(policy, batches)
        return responses, copied_weights(policy)

    def job(policy: Policy) -> list[tuple[list[int], list[float]]]:
        return list(zip(*sample(policy), strict=True))

    (wanted,) = on_layout(model_dir, job)
    for responses in on_layout(model_dir, job, fp32(**settings)):
        assert_same_responses(responses, wanted)
    undisturbed = on_layout(model_dir, partial(updated, samples=False), fp32(**settings))
    for (_, weights), (_, expected) in zip(
        on_layout(model_dir, partial(updated, samples=True), fp32(**settings)), undisturbed, strict=True
    ):
        assert_same_weights(weights, expected)


def assert_same_responses(got: Sequence[tuple], wanted: Sequence[tuple]) -> None:
    assert [ids for ids, _ in got] == [ids for ids, _ in wanted]
    for (_, values), (_, expected) in zip(got, wanted, strict=True):
        assert values == pytest.approx(expected, abs=4e-6)


# ---- whole steps ----


@pytest.mark.slow
def test_two_steps_of_the_trainer_are_those_of_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm start, rollouts, log-probs, updates, validation, checkpoint and export."""
    pytest.importorskip(
        "math_verify", reason="the environment of megatron-core 0.19 has the policy floor only"
    )
    from megatron_fec.algorithm.advantages import ADVANTAGES
    from megatron_fec.config import load_config
    from megatron_fec.job import train

    # An untrained policy earns nothing, and all advantages would be 0.
    monkeypatch.setitem(ADVANTAGES, "grpo", lambda rewards, history: advantages(*rewards.shape))

    def rows(context_parallel: int) -> list[dict[str, float]]:
        run_dir = tmp_path / f"cp{context_parallel}"
        overrides = [
            f"trainer.run_dir={run_dir}",
            f"policy.context_parallel={context_parallel}",
            "policy.tensor_parallel=1",
            "policy.micro_batch_tokens=64",
            "rollout.engine=native",
            "rollout.prompts_per_step=4",
            "rollout.group_size=4",
            "algorithm.prompts_per_update=2",
            "algorithm.epochs=2",
            "optimizer.lr=3e-3",
            "algorithm.aggregation=seq_mean_token_mean",
            "data.validation=embedded:countdown",
            "warm_start.steps=2",
            "trainer.max_steps=2",
            "trainer.eval_samples=1",
            "trainer.eval_every=0",
            "trainer.save_every=0",
        ]
        config = load_config(Path(__file__).parents[1] / "configs" / "tiny_cpu.yaml", overrides)

        def job(rank: int) -> None:
            train(config)

        run_on_ranks(context_parallel, job)
        assert (run_dir / "hf" / "config.json").is_file()
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    for got, wanted in zip(rows(2), rows(1), strict=True):
        is_timed = ("timers/", "memory/", "train_rollouts/tokens_per_second")
        compared = {name: value for name, value in wanted.items() if not name.startswith(is_timed)}
        assert wanted["train_optim/clip_fraction_upper"] > 0 and wanted["train_optim/loss"] != 0
        assert {name: got[name] for name in compared} == pytest.approx(compared, rel=1e-4, abs=1e-5)
