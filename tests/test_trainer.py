"""The trainer's decisions that need no model: what is due, which order, what a resume accepts."""

from pathlib import Path
from typing import Any

import pytest

from megatron_fec.config import ConfigError, load_config
from megatron_fec.policy.checkpoint import TrainerState
from megatron_fec.trainer import Trainer, _is_due
from megatron_fec.updates import update_order

TINY = Path(__file__).parents[1] / "configs" / "tiny_cpu.yaml"


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path):
    nothing: Any = None
    trainer = Trainer(
        config=load_config(TINY, []),
        policy=nothing,
        offload=nothing,
        collector=nothing,
        schedule=nothing,
        strategy_state=nothing,
        train_prompts=(),
        validation_prompts=(),
        updates=nothing,
        log=nothing,
        stop=nothing,
        pack_layout=nothing,
        state=TrainerState(step=0, consumed_samples=0, weight_version=0, schedule={}),
    )
    saved = TrainerState(step=4, consumed_samples=8, weight_version=4, schedule={"name": "grpo"})
    with pytest.raises(ConfigError, match=r"schedule\.name=id, but .*step_000004 was saved under grpo"):
        trainer.load_state_dict(tmp_path / "step_000004", saved)


def test_saving_and_evaluating_when_due():
    assert [step for step in range(1, 8) if _is_due(3, step, last=7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if _is_due(0, step, last=7)] == [7]


def test_later_epochs_shuffle_the_updates():
    assert update_order(6, 0, 3, 0) == [0, 1, 2, 3, 4, 5]
    second = update_order(6, 0, 3, 1)
    assert sorted(second) == [0, 1, 2, 3, 4, 5] and second != sorted(second)
    assert update_order(6, 0, 3, 1) == second
    assert update_order(6, 0, 4, 1) != second
