"""One run with everything that a strategy may need from the trainer: marks, reference, state, refills, dumps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import assert_same_weights, outcome, rows_of, train

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "model.path": "embedded",
    "data.train": "embedded:countdown",
    "warm_start.steps": 250,
    "algorithm.policy_loss": "clip_cov+kl+adaptive_entropy_bonus+truncated_importance",
    "algorithm.advantage": "dcpo+overlong",
    "algorithm.options.clip_cov_low": 0.05,
    "algorithm.options.clip_cov_share": 0.01,
    "algorithm.options.kl_coef": 0.05,
    "algorithm.options.overlong_buffer": 6,
    "algorithm.schedule.name": "target",
    "algorithm.schedule.options.target_shape": "cosine",
    "algorithm.schedule.options.target_end": 0.5,
    "rollout.max_refills": 1,
    "rollout.group_size": 4,
    "trainer.dump_every": 2,
    "trainer.save_every": 2,
    "trainer.max_steps": 4,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole") / "run", SETTINGS)


def test_every_part_reports(whole: Path):
    rows = rows_of(whole)
    assert len(rows) == 4
    for number, row in enumerate(rows):
        assert row["train_optim/cov_chosen"] > 0
        assert row["train_optim/reference_kl"] >= 0
        assert row["train_optim/importance_weight"] == pytest.approx(
            1.0, abs=1e-3
        )  # the engine is the trainer
        assert row["train_rollouts/refills"] in (0.0, 1.0)
        assert row["train_optim/target_entropy"] > 0
        assert ("train_rollouts/entropy_change" in row) == (number > 0)
        assert row["train_optim/dH/predicted"] != 0
    moved = [row["train_optim/dH/measured"] for row in rows]
    assert any(abs(value) > 1e-5 for value in moved)
    assert any(row["train_rollouts/refills"] for row in rows)
    assert rows[-1]["train_optim/reference_kl"] > 0
    dumps = sorted(path.parent.name for path in (whole / "dumps").rglob("*.parquet"))
    assert dumps == ["step_000000", "step_000002"]


def test_a_resumed_run_keeps_all_state(whole: Path, tmp_path: Path):
    """The history of rewards, the bonus, the controller, the reference and the place in the data."""
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_000004")
    shutil.rmtree(again / "hf")
    train(again, SETTINGS)
    assert rows_of(again) == rows_of(whole)
    assert_same_weights(again / "hf", whole / "hf")


def test_state_of_another_strategy_is_refused(whole: Path, tmp_path: Path):
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    code, text = outcome(again, SETTINGS | {"algorithm.advantage": "grpo+overlong", "trainer.max_steps": 5})
    assert code == 2
    assert "algorithm.advantage=grpo+overlong, but the checkpoint was saved under dcpo+overlong" in text
    assert "Traceback" not in text
    assert "advantage: dcpo+overlong" in (again / "config.yaml").read_text()
