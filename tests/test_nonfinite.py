"""NaN and infinity on one rank: every rank stops or skips before the optimizer moves, and the batch can be replayed."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from policy_fixtures import (
    allow_children,
    assert_same_weights,
    clip_token_loss,
    copied_weights,
    fp32,
    make_groups,
    on_layout,
    pack_for,
    save_model,
)
from ranks import run_on_ranks
from run_fixtures import CONFIG, SETTINGS, SMALL, rows_of
from torch import Tensor

from megatron_fec import trainer as trainer_module
from megatron_fec.config import ConfigError, load_config
from megatron_fec.dump_reader import read_dump
from megatron_fec.job import train
from megatron_fec.policy.checkpoint_files import find_checkpoints
from megatron_fec.policy.nonfinite import NonFiniteError
from megatron_fec.policy.step import Policy, TokenLoss, compute_logprobs, train_update, unwrapped
from megatron_fec.replay import run_replay
from megatron_fec.stop import Stop, listen
from megatron_fec.types import LossOutput, MicroBatch, TokenStats
from megatron_fec.updates import MAX_SKIPS_IN_A_ROW, UpdateRecord, Updates

LAYOUTS = {
    "dp": ({}, 2),
    "dp_sharded": ({"distributed_optimizer": True}, 2),
    "tp": ({"tensor_parallel": 2}, 1),
    "pp": ({"pipeline_parallel": 2}, 1),
}


# ------------------------------------------------------------------ one update


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def infinite_loss(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
    out = clip_token_loss(stats, micro_batch)
    return replace(out, loss_sum=out.loss_sum + torch.inf)  # with a gradient that is finite


def nan_logprob(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
    """The loss of log-probs of which one is NaN, and hidden from the loss as a clipped token would be."""
    first = micro_batch.response_mask.nonzero()[0]
    hidden = micro_batch.response_mask.clone()
    hidden[first] = False
    stats.logprobs.data[first] = math.nan  # as a kernel would have left it
    seen = stats.logprobs.nan_to_num(-1.0)
    return clip_token_loss(replace(stats, logprobs=seen), replace(micro_batch, response_mask=hidden))


def spoil_gradient(policy: Policy, name: str) -> None:
    parameter = dict(unwrapped(policy.chunks[0]).named_parameters())[name]
    parameter.register_hook(lambda gradient: gradient * math.inf)


def trained(policy: Policy, batches: Sequence[MicroBatch], losses: Sequence[TokenLoss]) -> list[str]:
    """The errors of one update for each loss."""
    (filled,), _ = compute_logprobs(policy, [batches])
    policy.scheduler.step(1)
    errors = []
    for loss in losses:
        try:
            train_update(policy, filled, loss)
        except NonFiniteError as error:
            errors.append(str(error))
    return errors


def state_of(policy: Policy) -> tuple[dict[str, Tensor], list[Any]]:
    """Weights, and what this rank's optimizer remembers."""
    inner = policy.optimizer.optimizer.state_dict()["state"]  # type: ignore[attr-defined]
    return copied_weights(policy), [
        {name: torch.as_tensor(value).clone() for name, value in entry.items()} for entry in inner.values()
    ]


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("loss", "fault"), [(infinite_loss, "the loss"), (nan_logprob, "the log-probs")])
def test_a_refused_update_is_as_if_it_had_not_been(model: Path, layout: str, loss: Any, fault: str) -> None:
    settings, data_parallel = LAYOUTS[layout]

    def job(policy: Policy) -> tuple[list[str], Any]:
        batches = pack_for(policy, make_groups(), micro_batch_tokens=32)[0]
        is_culprit = dist.get_rank() == dist.get_world_size() - 1
        bad = loss if is_culprit and policy.layout.is_last_stage else clip_token_loss
        return trained(policy, batches, [bad, clip_token_loss]), state_of(policy)

    def clean_job(policy: Policy) -> Any:
        batches = pack_for(policy, make_groups(), micro_batch_tokens=32)[0]
        assert trained(policy, batches, [clip_token_loss]) == []
        return state_of(policy)

    found = on_layout(model, job, fp32(**settings), data_parallel=data_parallel)
    wanted = on_layout(model, clean_job, fp32(**settings), data_parallel=data_parallel)
    for (errors, (weights, moments)), (clean_weights, clean_moments) in zip(found, wanted, strict=True):
        assert errors == [f"not finite: {fault}, first on rank 1"]
        assert_same_weights(weights, clean_weights)
        assert len(moments) == len(clean_moments) > 0
        for one, other in zip(moments, clean_moments, strict=True):
            assert_same_weights(one, other)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("dp", "decoder.layers.1.mlp.linear_fc1.weight"),
        ("dp_sharded", "decoder.layers.0.mlp.linear_fc2.weight"),
        ("tp", "decoder.layers.1.self_attention.linear_qkv.weight"),
        ("pp", "output_layer.weight"),
    ],
)
def test_a_gradient_is_named_on_the_rank_where_it_arose(model: Path, layout: str, name: str) -> None:
    """Also where the reduction over data-parallel ranks has carried it to all of them since."""
    settings, data_parallel = LAYOUTS[layout]

    def job(policy: Policy) -> list[str]:
        before = state_of(policy)[0]
        if dist.get_rank() == 1:
            spoil_gradient(policy, name)
        batches = pack_for(policy, make_groups(), micro_batch_tokens=32)[0]
        errors = trained(policy, batches, [clip_token_loss])
        assert_same_weights(copied_weights(policy), before)
        return errors

    for errors in on_layout(model, job, fp32(**settings), data_parallel=data_parallel):
        assert errors == [f"not finite: the gradient of module.{name}, first on rank 1"]


def test_a_sum_that_overflows_is_the_gradient_norm(model: Path) -> None:
    """Every gradient is finite, and the sum of their squares is not."""

    def huge(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
        out = clip_token_loss(stats, micro_batch)
        return replace(out, loss_sum=out.loss_sum * 1e25)

    def job(policy: Policy) -> list[str]:
        return trained(policy, pack_for(policy, make_groups())[0], [huge])

    assert on_layout(model, job) == [["not finite: the gradient norm, first on rank 0"]]


@pytest.mark.parametrize("layout", ["dp", "tp", "pp"])
def test_a_weight_is_named_before_all_that_follows_from_it(model: Path, layout: str) -> None:
    settings, data_parallel = LAYOUTS[layout]
    name = "decoder.layers.0.self_attention.linear_proj.weight"

    def job(policy: Policy) -> str:
        if dist.get_rank() == 1:
            dict(unwrapped(policy.chunks[0]).named_parameters())[name].data[3, 3] = math.nan
        with pytest.raises(NonFiniteError) as error:
            compute_logprobs(policy, pack_for(policy, make_groups()))
        return str(error.value)

    found = on_layout(model, job, fp32(**settings), data_parallel=data_parallel)
    assert found == [f"not finite: the weight module.{name}, first on rank 1"] * 2


# ------------------------------------------------------------------ whole runs


def run(
    run_dir: Path,
    bad: Sequence[tuple[int, int]],
    *,
    poison_logprobs: bool = False,
    stop_at: int = 0,
    **settings: Any,
) -> list[str]:
    """Each rank's error, "" if none, of a run on two ranks, on the last of which these (step, update) overflow.

    poison_logprobs: the pass before the first update computes NaN there, while the engine samples well.
    """
    merged = SETTINGS | SMALL | {"trainer.run_dir": run_dir, "trainer.eval_every": 0} | settings
    config = load_config(CONFIG, [f"{key}={value}" for key, value in merged.items()])

    def job(rank: int) -> str:
        allow_children()
        listen()
        if rank == 1:
            _overflow_at(bad)
            if poison_logprobs:
                _poison_logprobs()
        _signal_at(stop_at)
        try:
            train(config)
        except RuntimeError as error:
            return str(error)
        return ""

    return run_on_ranks(2, job)


def _overflow_at(bad: Sequence[tuple[int, int]]) -> None:
    make, run_step, at = Updates._token_loss, Updates.run, [0]

    def noting_the_step(self: Updates, updates: Any, weights: Any, step: int) -> dict[str, float]:
        at[0] = step
        return run_step(self, updates, weights, step)

    def overflowing(self: Updates, weights: Any, record: UpdateRecord) -> TokenLoss:
        loss = make(self, weights, record)
        if (at[0], record.update) not in bad:
            return loss

        def times_infinity(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
            out = loss(stats, micro_batch)
            return replace(out, loss_sum=out.loss_sum * math.inf)

        return times_infinity

    Updates.run, Updates._token_loss = noting_the_step, overflowing  # of this process, a fork


def _poison_logprobs() -> None:
    compute = compute_logprobs

    def poisoned(policy: Policy, updates: Any) -> Any:
        core: Any = unwrapped(policy.chunks[0])
        core.output_layer.register_forward_hook(lambda _, __, out: (out[0] * math.nan, out[1]))
        return compute(policy, updates)

    trainer_module.compute_logprobs = poisoned


def _signal_at(stop_at: int) -> None:
    check, count = Stop.check, [0]

    def check_with_signal(self: Stop, *ahead: str) -> None:
        count[0] += 1
        if count[0] == stop_at:
            signal.raise_signal(signal.SIGUSR1)
        check(self, *ahead)

    Stop.check = check_with_signal


LAYOUT_SETTINGS = {
    "dp": {"policy.tensor_parallel": 1},
    "tp": {},
    "pp": {"policy.tensor_parallel": 1, "policy.pipeline_parallel": 2},
}


@pytest.mark.parametrize("layout", list(LAYOUT_SETTINGS))
def test_a_run_stops_names_step_tensor_and_rank_and_dumps_the_update(tmp_path: Path, layout: str) -> None:
    first, second = run(tmp_path, [(1, 2)], **LAYOUT_SETTINGS[layout])
    folder = tmp_path / "dumps" / "nonfinite_update_0002" / "step_000001"
    assert (
        first
        == second
        == (
            f"step 1, epoch 1, update 2: not finite: the loss, first on rank 1. Its tokens are in {folder}; "
            "trainer.on_nonfinite=skip goes on without such updates."
        )
    )
    dump = read_dump(folder)
    assert (dump.settings.step, dump.settings.parts) == (1, 2 if layout == "dp" else 1)
    (update,) = dump.updates
    assert (update.update, update.epoch) == (2, 1)
    assert len(update.sequence_ids.unique()) == 8  # two prompts, four responses each
    assert run_replay(folder, ["clip@grpo"]).tokens == len(update.logprobs) > 0
    assert len(rows_of(tmp_path)) == 1


def test_a_save_in_the_background_is_finished_before_the_run_ends(tmp_path: Path) -> None:
    first, second = run(tmp_path, [(1, 0)], **{"trainer.async_save": True, "trainer.save_every": 1})
    assert first == second and first.startswith("step 1, epoch 0, update 0: not finite: the loss")
    assert find_checkpoints(tmp_path / "checkpoints") == [tmp_path / "checkpoints" / "step_000001"]


def test_log_probs_before_training_are_named_and_the_reader_names_the_rows(tmp_path: Path) -> None:
    first, second = run(tmp_path, [], poison_logprobs=True, **LAYOUT_SETTINGS["dp"])
    folder = tmp_path / "dumps" / "nonfinite_logprobs" / "step_000000"
    assert (
        first
        == second
        == (
            f"step 0, before its first update: not finite: the log-probs, first on rank 1. Its tokens are in {folder}."
        )
    )
    with pytest.raises(ConfigError, match=r"rank_1.parquet row 0: logprob=nan must be finite and at most 0"):
        read_dump(folder)
    dump = read_dump(folder, skip_corrupt=True)
    assert dump.faults and all(fault.startswith("rank_1.parquet row ") for fault in dump.faults)
    assert sum(len(update.logprobs) for update in dump.updates) > 0  # those of rank 0
    assert rows_of(tmp_path) == []


@pytest.mark.slow
def test_skipped_updates_are_counted_and_a_resumed_run_counts_on(tmp_path: Path) -> None:
    skip = {"trainer.on_nonfinite": "skip", "trainer.max_steps": 3, "rollout.prompts_per_step": 2}
    bad = [(0, 1), (1, 0), (1, 1)]  # two updates a step: the second has none that is made
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole, bad, **skip) == ["", ""]
    rows = rows_of(whole)
    assert [row["train_optim/skipped_updates"] for row in rows] == [1.0, 3.0, 3.0]
    assert ["train_optim/grad_norm" in row for row in rows] == [True, False, True]
    assert all(row["train_optim/lr"] > 0 for row in rows)
    folders = sorted(path.relative_to(whole / "dumps") for path in (whole / "dumps").glob("*/*"))
    assert list(map(str, folders)) == [
        "nonfinite_update_0000/step_000001",
        "nonfinite_update_0001/step_000000",
        "nonfinite_update_0001/step_000001",
    ]
    assert run(stopped, bad, stop_at=7, **skip) == ["", ""]  # before the third step
    state = json.loads((stopped / "checkpoints/step_000002/trainer_state.json").read_text())["trainer"]
    assert (state["skipped_updates"], state["skips_in_a_row"]) == (3, 3)
    assert run(stopped, bad, **skip) == ["", ""]
    assert rows_of(stopped) == rows
    name = "checkpoints/step_000003/trainer_state.json"
    assert (stopped / name).read_text() == (whole / name).read_text()


def test_too_many_skips_in_a_row_stop_the_run(tmp_path: Path) -> None:
    """A finite update between them starts the count again."""
    bad = [(0, update) for update in (0, 1, 2, 4, 5, 6, 7)]
    settings = {"trainer.on_nonfinite": "skip", "algorithm.epochs": 4, **LAYOUT_SETTINGS["dp"]}
    first, second = run(tmp_path, bad, **settings)
    assert first == second
    assert first.startswith("step 0, epoch 3, update 7: not finite: the loss, first on rank 1.")
    assert f"The {MAX_SKIPS_IN_A_ROW} updates before it were skipped too" in first
    assert len(list((tmp_path / "dumps").iterdir())) == len(bad)
    assert not (tmp_path / "checkpoints").exists()
