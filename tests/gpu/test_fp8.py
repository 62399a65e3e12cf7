"""FP8 recipes on a GPU: they train, weights arrive and leave whole, and the monitor sees what they cost.

    .venv/bin/python -m pytest -ra tests/gpu/test_fp8.py

Needs one GPU of compute capability 8.9 or higher (9.0, H100, for fp8_blockwise, 10.0, B200, for mxfp8; what the GPU does
not have is skipped) and the extra gpu; two GPUs for tensor parallelism. No GPU has run it so far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.policy_jobs import distance, run_policy, save_checkpoint

from megatron_fec.config import ConfigError
from megatron_fec.policy.kernels import Installed
from megatron_fec.policy.layer_spec import uses_transformer_engine
from megatron_fec.policy_options import FP8
from megatron_fec.precision_rules import RECIPES, check_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not uses_transformer_engine(),
        reason="needs Transformer Engine (the extra gpu)",
    ),
]
STEPS = 30
E4M3_ROUNDING = 2**-4  # half a unit of the last of three mantissa bits, relative to the value
SMALLEST = 2**-6  # of a block's largest value: below it e4m3 has fewer bits


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def bf16(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_policy(model_dir, tmp_path_factory.mktemp("bf16"), steps=STEPS)


@pytest.fixture(params=FP8)
def precision(request: pytest.FixtureRequest) -> str:
    """A recipe that this GPU computes."""
    here = Installed.here()
    try:
        check_gpu(
            request.param,
            capability=here.capability,
            te_version=here.transformer_engine,
            cuda_version=here.cuda,
        )
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


def check_trains(fp8: dict[str, Any], bf16: dict[str, Any]) -> None:
    losses = fp8["losses"]
    assert losses[-1] < 0.7 * losses[0]  # the same few sequences again and again
    assert losses[-1] == pytest.approx(bf16["losses"][-1], abs=0.2 * (bf16["losses"][0] - bf16["losses"][-1]))
    assert fp8["grad_norm"] == pytest.approx(bf16["grad_norm"], rel=0.25)


def test_a_recipe_trains(model_dir: Path, tmp_path: Path, bf16: dict[str, Any], precision: str) -> None:
    fp8 = run_policy(model_dir, tmp_path, precision=precision, steps=STEPS, check=True)
    check_trains(fp8, bf16)
    assert any(RECIPES[precision].name in line for line in fp8["lines"])
    assert 0 < distance(fp8["tokens"], bf16["tokens"]) < 0.5  # FP8 is in use, and near
    # The switch of the monitor gives what a policy in bf16 computes, of sequences that are padded otherwise.
    assert distance(fp8["tokens_bf16"], bf16["tokens"]) < min(1e-2, distance(fp8["tokens"], bf16["tokens"]))
    check = fp8["check"]
    assert 0 < check["fp8/logprob_error"] < 0.5 and 0 < check["fp8/entropy_error"] < 0.5
    assert abs(check["fp8/entropy_bias"]) <= check["fp8/entropy_error"]
    assert 0 <= check["fp8/flipped"] <= 1 and 0 <= check["fp8/clipped"] <= 1
    for name, tensor in bf16["loaded"].items():  # weights are bf16 and whole
        assert torch.equal(fp8["loaded"][name].cpu(), tensor.cpu()), name


@pytest.mark.parametrize("ends", [(1, 0), (1, 1)])
def test_layers_in_bf16_come_nearer(
    model_dir: Path, tmp_path: Path, bf16: dict[str, Any], precision: str, ends: tuple[int, int]
) -> None:
    if precision == "fp8_delayed":
        pytest.skip("has no layers in bf16")
    start, end = ends
    (tmp_path / "all").mkdir()
    everywhere = run_policy(model_dir, tmp_path / "all", precision=precision)
    options = {"fp8_bf16_layers_at_start": start, "fp8_bf16_layers_at_end": end}
    partly = run_policy(model_dir, tmp_path, precision=precision, options=options)
    errors = [distance(seen["tokens"], bf16["tokens"]) for seen in (partly, everywhere)]
    assert 0 < errors[0] < errors[1] * 1.1, errors


def test_weights_in_fp8(model_dir: Path, tmp_path: Path, bf16: dict[str, Any], precision: str) -> None:
    """They are read as bf16 within FP8's rounding, and the optimizer starts from the checkpoint, not from them."""
    fp8 = run_policy(model_dir, tmp_path, precision=precision, steps=STEPS, options={"fp8_params": True})
    check_trains(fp8, bf16)
    rounded = 0
    unscaled = (
        2**-10 if precision == "fp8_delayed" else 0.0
    )  # its first scale is 1: half of e4m3's least step
    for name, tensor in bf16["loaded"].items():
        ours, theirs = fp8["loaded"][name].cpu().float(), tensor.cpu().float()
        error = (ours - theirs).abs()
        assert (
            error <= E4M3_ROUNDING * theirs.abs() + E4M3_ROUNDING * SMALLEST * theirs.abs().max() + unscaled
        ).all(), name
        rounded += bool(error.any())
    assert rounded > 0


@pytest.mark.gpu(2)
def test_tensor_parallel(model_dir: Path, tmp_path: Path, bf16: dict[str, Any], precision: str) -> None:
    """With sequence parallelism: each rank's share of the tokens is a multiple of the recipe's."""
    fp8 = run_policy(
        model_dir,
        tmp_path,
        precision=precision,
        steps=STEPS,
        gpus=2,
        tensor_parallel=2,
        sequence_parallel=True,
    )
    check_trains(fp8, bf16)
