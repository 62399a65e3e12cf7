"""Engines that answer with what must not be trained on: the whole run stops on every rank, and says where it is."""

import re
from pathlib import Path

import pytest
import torch
from run_fixtures import outcome
from safetensors.torch import load_file, save_file

from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.rollout.engine import vllm_is_available
from megatron_fec.tasks.arithmetic import VOCABULARY

pytestmark = pytest.mark.slow
needs_vllm = pytest.mark.skipif(not vllm_is_available(), reason="vllm is not installed")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one weight that is not a number, so that no logit is one."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    save_tiny_model(folder, VOCABULARY, seed=0)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("engine", "ranks"), [("native", 2), pytest.param("vllm", 1, marks=[pytest.mark.vllm, needs_vllm])]
)
def test_log_probs_of_nan_stop_every_rank(poisoned: Path, tmp_path: Path, engine: str, ranks: int) -> None:
    settings = {
        "model.path": poisoned,
        "data.train": "embedded:countdown",
        "rollout.engine": engine,
        "policy.tensor_parallel": ranks,
        "rollout.prompts_per_step": 4,
        "trainer.max_steps": 2,
    }
    code, text = outcome(tmp_path / "run", settings, processes=ranks, launcher="torchrun")
    assert code == 1
    fault = (
        r"RuntimeError: prompt \d+, sample 0: log-prob nan of token 0 is not a finite number of at most 0\."
    )
    assert len(re.findall(fault, text)) == ranks, text
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""  # no step was trained
    assert not (tmp_path / "run" / "checkpoints").exists()
