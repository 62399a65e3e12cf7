"""The policy on Transformer Engine's layers: the same function and the same update as the local layers, in bf16.

    .venv/bin/python -m pytest -ra tests/gpu/test_transformer_engine.py

Needs one GPU and the extra gpu; two GPUs for the case of tensor parallelism. No GPU has run it so far.
Both kinds of layers are compared with transformers in float64: an error may be half as large again as the other's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.policy_jobs import distance, run_policy, save_checkpoint
from policy_fixtures import hf_tokens, make_groups

from megatron_fec.policy.layer_spec import uses_transformer_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not uses_transformer_engine(),
        reason="needs Transformer Engine (the extra gpu)",
    ),
]
NOISE = 1e-3  # of a mean log-prob in bf16, below which two errors are not told apart


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def exact(model_dir: Path) -> dict[Any, float]:
    """Log-probs by transformers in float64."""
    found = hf_tokens(model_dir, make_groups(), torch.float64)
    return {key: logprob for key, (logprob, _) in found.items()}


@pytest.fixture(scope="module")
def local(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_policy(model_dir, tmp_path_factory.mktemp("local"), layers="local")


def check_same(engine: dict[str, Any], local: dict[str, Any], exact: dict[Any, float]) -> None:
    ours, theirs = distance(engine["tokens"], exact), distance(local["tokens"], exact)
    assert ours <= 1.5 * theirs + NOISE, (ours, theirs)
    assert engine["grad_norm"] == pytest.approx(local["grad_norm"], rel=2**-4)
    assert engine["update"]["loss"] == pytest.approx(local["update"]["loss"], abs=0.02)
    assert engine["loaded"].keys() == local["loaded"].keys()
    for name, tensor in local["loaded"].items():  # fused norms and all: every weight is where it belongs
        assert torch.equal(engine["loaded"][name].cpu(), tensor.cpu()), name


@pytest.mark.parametrize("attention", ["auto", "fused", "flash", "unfused"])
def test_the_layers_are_the_same_function(
    model_dir: Path, tmp_path: Path, local: dict[str, Any], exact: dict[Any, float], attention: str
) -> None:
    if attention == "flash" and local["installed"]["flash_attention"] is None:
        pytest.skip("needs flash-attn")
    engine = run_policy(model_dir, tmp_path, options={"attention": attention})
    check_same(engine, local, exact)
    assert any(attention in line and "Transformer Engine" in line for line in engine["lines"])


@pytest.mark.parametrize("settings", [{"logits_chunk_tokens": 64}, {"options": {"recompute": "full"}}])
def test_the_head_in_chunks_and_recomputing(
    model_dir: Path, tmp_path: Path, local: dict[str, Any], exact: dict[Any, float], settings: dict[str, Any]
) -> None:
    check_same(run_policy(model_dir, tmp_path, **settings), local, exact)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel(
    model_dir: Path, tmp_path: Path, local: dict[str, Any], exact: dict[Any, float], sequence_parallel: bool
) -> None:
    engine = run_policy(model_dir, tmp_path, gpus=2, tensor_parallel=2, sequence_parallel=sequence_parallel)
    check_same(engine, local, exact)


def test_fused_kernels_are_in_use_and_named(model_dir: Path, tmp_path: Path) -> None:
    lines = {line[:17].strip(): line[18:] for line in run_policy(model_dir, tmp_path)["lines"]}
    assert lines["layers"].startswith("Transformer Engine ")
    assert lines["RoPE"] == "Transformer Engine's, fused"
    assert lines["optimizer"] == "FusedAdam of transformer_engine"
    assert lines["token statistics"] == "triton kernel"
