"""launch/train.py --dry-run: what it prints is what the run does, and what the run refuses it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fec.config import Config, ConfigError, load_config
from megatron_fec.dry_run import dry_run_text
from megatron_fec.policy.sizes import places

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs" / "tiny_cpu.yaml")
QWEN_7B = {  # sizes of Qwen/Qwen2.5-7B
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "--dry-run", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def tiny(folder: Path, *overrides: str) -> Config:
    return load_config(TINY, [f"trainer.run_dir={folder / 'run'}", "rollout.engine=native", *overrides])


@pytest.fixture
def qwen_7b(tmp_path: Path) -> Path:
    """The paper's model as far as its config.json."""
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    return folder


def table(text: str, heading: str) -> list[list[str]]:
    """Rows of numbers below a heading."""
    lines = text.split(heading)[1].splitlines()[2:]
    rows = [line.split() for line in lines]
    return rows[: next(i for i, row in enumerate(rows) if not row or not row[0].isdigit())]


@pytest.mark.slow
def test_the_script_needs_no_process_group_and_leaves_nothing(tmp_path: Path):
    overrides = [f"trainer.run_dir={tmp_path / 'run'}", "policy.tensor_parallel=2", "rollout.engine=native"]
    result = child("--config", TINY, "--gpus-per-node", "4", *overrides, SLURM_JOB_NUM_NODES="2")
    assert (result.returncode, result.stderr) == (0, "")
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout.split("# rank layout")[0])
    assert load_config(printed) == load_config(TINY, overrides)
    assert "2 nodes x 4 GPUs = 8 ranks = TP 2 x CP 1 x DP 4 x PP 1" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


@pytest.mark.slow
def test_a_hub_name_out_of_reach_is_one_line_and_the_rest_is_printed(tmp_path: Path):
    """The hub is a closed port, and the cache is empty."""
    config = str(ROOT / "configs" / "qwen7b_did.yaml")
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = child("--config", config, "model.path=some/model", **environment)
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if "is not in reach" in line]
    assert line.startswith("model.path=some/model is not in reach of this machine (")
    assert "Connection refused" in line
    assert "16 a rollout = 512 / 32 prompts" in result.stdout
    assert "GB" not in result.stdout


def test_a_published_architecture_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_fec.dry_run.try_to_load_from_cache", lambda *arguments: None)
    monkeypatch.setattr("megatron_fec.dry_run._reach", lambda url: pytest.fail(f"asked {url}"))
    config = load_config(ROOT / "configs" / "qwen7b_did.yaml")
    text = dry_run_text(config, nodes=1, gpus_per_node=8)
    assert "sizes of Qwen/Qwen2.5-7B as published, which the package holds" in text
    assert "7,615,616,512 parameters in all" in text


def test_the_layout_is_that_of_the_groups(tmp_path: Path):
    settings = ["policy.tensor_parallel=2", "policy.pipeline_parallel=2", "policy.context_parallel=2"]
    config = tiny(tmp_path, *settings)
    rows = table(dry_run_text(config, nodes=4, gpus_per_node=4), "# rank layout")
    expected = [
        [p.rank, p.rank // 4, p.rank % 4, p.tensor, p.context, p.data, p.pipeline]
        for p in places(config.policy, 16)
    ]
    assert [[int(cell) for cell in row] for row in rows] == expected


def test_virtual_stages_take_micro_batches_in_groups(qwen_7b: Path):
    settings = [f"model.path={qwen_7b}", "policy.pipeline_parallel=4", "policy.tensor_parallel=1"]
    config = load_config(
        ROOT / "configs" / "qwen7b_did.yaml",
        [*settings, "policy.sequence_parallel=false", "policy.options.virtual_stages=7"],
    )
    text = dry_run_text(config, nodes=1, gpus_per_node=8)
    assert "x PP 4, 7 virtual stages on each\n" in text
    found = re.search(r"an update takes at most about (\d+), in groups of 4\n", text)
    assert found is not None and int(found[1]) % 4 == 0


def test_groups_that_span_nodes_are_noted(tmp_path: Path):
    config = tiny(tmp_path, "policy.tensor_parallel=2")
    assert "note:" not in dry_run_text(config, nodes=2, gpus_per_node=2)
    text = dry_run_text(config, nodes=2, gpus_per_node=1)
    assert "note: policy.tensor_parallel=2 does not divide the 1 GPUs of a node" in text


def test_the_memory_of_the_papers_model(qwen_7b: Path):
    """configs/base.yaml says 23 GB for weights, gradients and optimizer."""
    config = load_config(ROOT / "configs" / "qwen7b_did.yaml", [f"model.path={qwen_7b}"])
    text = dry_run_text(config, nodes=1, gpus_per_node=8)
    assert "7,615,616,512 parameters in all, bf16, optimizer distributed over DP x CP = 2" in text
    [[_, parameters, *sizes]] = table(text, "# memory")
    weights, gradients, optimizer, logits, total, distributed, plain = map(float, sizes)
    count = int(parameters.replace(",", ""))
    assert weights + gradients + optimizer == pytest.approx(23, abs=0.5)
    assert (weights, gradients, optimizer) == pytest.approx(
        (count * 2e-9, count * 4e-9, count * 6e-9), abs=0.01
    )
    assert (distributed, plain) == pytest.approx((optimizer, 2 * optimizer), abs=0.02)
    assert logits == pytest.approx(16384 * 152064 / 4 * 2e-9, abs=0.01)
    assert total == pytest.approx(weights + gradients + optimizer + logits, abs=0.03)
    assert "NOT included: activations (recompute: full)" in text
    assert "57.3 kB a token" not in text  # that of one GPU: keys and values are split over the engine's four
    assert "at about 14.3 kB a token" in text


def test_a_reference_policy_lies_in_host_memory(qwen_7b: Path):
    settings = [f"model.path={qwen_7b}", "algorithm.policy_loss=clip+kl"]
    config = load_config(ROOT / "configs" / "qwen7b_did.yaml", settings)
    assert "host memory: the reference policy, 3.81 GB for each rank" in dry_run_text(
        config, nodes=1, gpus_per_node=8
    )


def test_the_batch_arithmetic(tmp_path: Path):
    config = tiny(tmp_path, "policy.tensor_parallel=1", "policy.micro_batch_tokens=100", "algorithm.epochs=3")
    text = dry_run_text(config, nodes=1, gpus_per_node=3)
    lines = dict(
        re.split(r" {2,}", line, maxsplit=1) for line in text.split("# batch arithmetic\n")[1].splitlines()
    )
    assert lines["a step"] == "64 prompts x 8 = 512 responses"
    assert lines["updates"] == "24 a rollout = 64 / 8 prompts x 3 (algorithm.epochs); 64 responses each"
    assert lines["DP rank"] == "21 or 22 prompts a step; 21 or 22 responses an update, balanced by tokens"
    assert lines["sampling"] == "by the policy itself on 3 DP x CP ranks, 21 or 22 prompts each"
    assert lines["micro-batch"].startswith("at most 100 tokens; the longest sequence has 23 positions")
    assert lines["micro-batch"].endswith("at most about 6")  # 22 sequences, 4 of which fit
    assert lines["the run"] == "80 steps: 40,960 responses, 1,920 updates"


def test_engines_on_nodes_of_their_own_are_no_ranks(tmp_path: Path):
    """Their size need not divide the number of ranks."""
    settings = ["rollout.engine=servers", "rollout.tensor_parallel=2", "policy.tensor_parallel=1"]
    text = dry_run_text(tiny(tmp_path, *settings), nodes=1, gpus_per_node=3)
    assert "sampling     by servers of 2 GPUs each, which are not among the ranks above" in text
    assert "what the engines hold on GPUs of their own" in text


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        (["policy.tensor_parallel=3"], 8, r"= 3 must divide the 8 processes of this run\. Start a multiple"),
        (
            ["policy.tensor_parallel=4"],
            8,
            r"must divide the checkpoint's num_attention_heads=2\. Use one of 1, 2",
        ),
        (["policy.pipeline_parallel=4"], 8, r"exceeds the checkpoint's num_hidden_layers=2: a stage"),
        (
            ["policy.pipeline_parallel=2", "policy.options.virtual_stages=2"],
            8,
            r"virtual_stages=2 = 4 exceeds the checkpoint's num_hidden_layers=2: a stage",
        ),
        (["policy.tensor_parallel=1"], 128, r"= 64 sequences must feed the 128 data-parallel ranks"),
        (
            ["rollout.engine=vllm", "rollout.tensor_parallel=3"],
            8,
            r"rollout\.tensor_parallel=3 must divide the 8",
        ),
        (["rollout.engine=vllm", "rollout.tensor_parallel=8"], 8, r"the checkpoint's num_attention_heads=2"),
        (
            ["rollout.max_response_tokens=2000"],
            8,
            r"= 2008 must not exceed the checkpoint's max_position_embeddings=1024",
        ),
    ],
)
def test_what_the_run_refuses_is_refused(tmp_path: Path, overrides: list[str], gpus: int, message: str):
    config = tiny(tmp_path, *overrides)
    with pytest.raises(ConfigError, match=message):
        dry_run_text(config, nodes=1, gpus_per_node=gpus)
