"""Every file in configs/ loads, and its arithmetic is what the file claims."""

from pathlib import Path

import pytest

from megatron_fec.config import ConfigError, load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# base.yaml lacks required keys on purpose; the others are of another schema (test_evaluation_config.py).
NO_RUN = {"base.yaml", "evaluation.yaml", "evaluation_tiny.yaml"}
# The paper's runs: schedule, longest sequence, then the batch: samples a step, updates a rollout, sequences an update.
PAPER = {
    "qwen7b_grpo.yaml": ("grpo", 8192, 4096, 16, 256),
    "qwen7b_clip_higher.yaml": ("dynamic_upper", 8192, 4096, 16, 256),
    "qwen7b_id.yaml": ("id", 8192, 4096, 16, 256),
    "qwen7b_did.yaml": ("did", 8192, 4096, 16, 256),
    "qwen7b_od.yaml": ("od", 8192, 4096, 16, 256),
    "qwen_math7b_id.yaml": ("id", 4096, 4096, 16, 256),
    "qwen_math7b_did.yaml": ("did", 4096, 4096, 16, 256),
    "qwen_math7b_od.yaml": ("od", 4096, 4096, 16, 256),
}


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*.yaml") if p.name not in NO_RUN))
def test_every_file_loads(name: str):
    config = load_config(CONFIGS / name)
    assert config.trainer.run_dir.startswith("runs/")


@pytest.mark.parametrize("name", PAPER)
def test_batch_arithmetic_of_the_papers_runs(name: str):
    config = load_config(CONFIGS / name)
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    per_update = config.algorithm.prompts_per_update * config.rollout.group_size
    batch = (samples, config.updates_per_rollout, per_update)
    assert (config.algorithm.schedule.name, longest, *batch) == PAPER[name]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name: str):
    config = load_config(CONFIGS / name)
    optimizer, schedule = config.optimizer, config.algorithm.schedule
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad, optimizer.warmup_steps) == (
        1e-6,
        0.1,
        1.0,
        10,
    )
    assert (config.trainer.max_steps, schedule.total_steps, "phase_ratio" in schedule.options) == (
        400,
        400,
        False,
    )
    assert (config.rollout.temperature, config.algorithm.thresholds.eps_std) == (1.0, 0.2)
    assert config.model.path == ("Qwen/Qwen2.5-Math-7B" if "math" in name else "Qwen/Qwen2.5-7B")
    assert config.trainer.run_dir == f"runs/{name.removesuffix('.yaml')}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_id.yaml")), ids=lambda path: path.stem)
def test_batch_arithmetic_of_the_id_runs_of_all_models(path: Path):
    """By the 7B settings; memory and layout are the planner's (tests/test_planning_configs.py)."""
    config = load_config(path)
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    per_update = config.algorithm.prompts_per_update * config.rollout.group_size
    assert (samples, config.updates_per_rollout, per_update) == (4096, 16, 256)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    assert longest == (4096 if "math" in path.stem else 8192)
    assert config.algorithm.schedule.options == {"lower_schedule": "text"}
    assert config.trainer.run_dir == f"runs/{path.stem}"


def test_clip_higher_is_a_constant_line():
    thresholds = load_config(CONFIGS / "qwen7b_clip_higher.yaml").algorithm.thresholds
    assert thresholds.upper == [0.0, 0.28]


def test_base_alone_is_not_a_run():
    with pytest.raises(ConfigError, match="is required"):
        load_config(CONFIGS / "base.yaml")


def test_the_table_names_every_7b_file():
    ours = {"qwen7b_id_fp8.yaml"}  # not the paper's
    assert set(PAPER) | ours == {p.name for p in CONFIGS.glob("*7b_*.yaml")}


def test_the_fp8_run_is_the_papers_id_run_but_for_its_precision():
    fp8, paper = load_config(CONFIGS / "qwen7b_id_fp8.yaml"), load_config(CONFIGS / "qwen7b_id.yaml")
    assert (fp8.policy.precision, fp8.rollout.precision) == ("fp8_blockwise", "policy")
    assert fp8.policy.options | paper.policy.options == fp8.policy.options  # nothing of it is lost
    fp8.policy.precision, fp8.policy.options = paper.policy.precision, paper.policy.options
    fp8.trainer.run_dir = paper.trainer.run_dir
    assert fp8 == paper
