"""The FP8 monitor in a step of training: when it is due, what it logs, and the limit that stops a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer import transformer_block
from policy_fixtures import (
    WEIGHTS,
    fp32,
    make_groups,
    off_policy,
    old_logprob_table,
    on_layout,
    pack_for,
    save_model,
)
from transformers import AutoTokenizer

from megatron_fec.config import Config, ConfigError, load_config
from megatron_fec.engines import native_engine
from megatron_fec.job import _pack_layout
from megatron_fec.policy.precision_check import start_check
from megatron_fec.policy.step import Policy, compute_logprobs, cores
from megatron_fec.preflight import _check_start, check_reference
from megatron_fec.rollout.engine import vllm_is_available
from megatron_fec.rollout.packing import pack
from megatron_fec.serving import _engine
from megatron_fec.step_dump import StepDumps
from megatron_fec.updates import Updates

TINY = Path(__file__).parents[1] / "configs" / "tiny_cpu.yaml"
KEYS = {
    "fp8/logprob_error",
    "fp8/logprob_bias",
    "fp8/entropy_error",
    "fp8/entropy_bias",
    "fp8/flipped",
    "fp8/clipped",
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def config_of(run_dir: Path, *overrides: str) -> Config:
    """Of a run in FP8. The policies of these tests are fp32 on CPU: the configuration decides what is looked at."""
    fixed = [
        f"trainer.run_dir={run_dir}",
        "policy.precision=fp8_tensorwise",
        "algorithm.options.dual_clip=null",
    ]
    return load_config(TINY, [*fixed, *overrides])


def updates_of(policy: Policy, config: Config) -> Updates:
    dumps = StepDumps(config=config, layout=policy.layout)
    return Updates(config=config, policy=policy, dumps=dumps, note=print)


@contextmanager
def shaken(policy: Policy) -> Iterator[None]:
    """Inside the block the weights are 10 % larger."""
    parameters = list(cores(policy)[0].parameters())
    for parameter in parameters:
        parameter.data.mul_(1.1)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data.div_(1.1)


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [0, 1, 2, 3]), (3, [0, 3])])
def test_it_is_logged_when_due(model_dir: Path, tmp_path: Path, every: int, due: list[int]) -> None:
    config = config_of(tmp_path, f"policy.options.fp8_check_every={every}")

    def job(policy: Policy) -> list[int]:
        packed = pack_for(policy, make_groups(), prompts_per_update=2, micro_batch_tokens=32)
        found = []
        for step in range(4):
            filled, _ = compute_logprobs(policy, packed)
            metrics = updates_of(policy, config).run(filled, WEIGHTS, step)
            seen = {name for name in metrics if name.startswith("fp8/")}
            assert seen in (set(), KEYS)
            if seen:  # nothing is quantized on CPU: FP8 and bf16 are the same bits
                assert metrics["fp8/logprob_error"] == metrics["fp8/flipped"] == 0
                found.append(step)
        return found

    for steps in on_layout(model_dir, job, data_parallel=2):
        assert steps == due


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_the_limit_stops_the_run(model_dir: Path, tmp_path: Path, limit: float) -> None:
    options = [f"policy.options.fp8_flip_limit={limit}", "policy.options.fp8_check_every=2"]
    config = config_of(tmp_path, *options)
    table = old_logprob_table(model_dir)

    def job(policy: Policy) -> dict[str, float]:
        packed = pack_for(policy, make_groups())
        batches = [[off_policy(batch, table) for batch in update] for update in packed]
        check = start_check(policy, batches, draw=0, exactly=shaken)
        return updates_of(policy, config)._checked(check, WEIGHTS, 6)

    match = (
        r"step 6: fp8_tensorwise clips 0\.\d+ of the sampled response tokens otherwise than bf16 does, more than "
        r"policy.options.fp8_flip_limit=0.0. Keep layers in bf16"
    )
    for settings, data_parallel in ((fp32(), 1), (fp32(pipeline_parallel=2), 1), (fp32(), 2)):
        expected: Any = nullcontext() if limit else pytest.raises(AssertionError, match=match)
        with expected:
            for metrics in on_layout(model_dir, job, settings, data_parallel=data_parallel):
                assert metrics.keys() == KEYS and 0 < metrics["fp8/flipped"] < limit


@pytest.mark.parametrize("precision", ["fp8_delayed", "fp8_tensorwise"])
def test_scales_that_move_have_the_limit_of_the_mismatch(
    model_dir: Path, tmp_path: Path, precision: str
) -> None:
    """A mean |log ratio| of 0.02 before the first update: noise of delayed scaling, a fault of the others."""
    config = config_of(tmp_path, f"policy.precision={precision}", "rollout.mismatch_limit=0.05")

    def job(policy: Policy) -> dict[str, float]:
        filled, _ = compute_logprobs(policy, pack_for(policy, make_groups()))
        moved = [
            [replace(b, old_logprobs=b.old_logprobs + 0.02) for b in update if b.old_logprobs is not None]
            for update in filled
        ]
        return updates_of(policy, config).run(moved, WEIGHTS, 1)

    if precision == "fp8_delayed":
        assert on_layout(model_dir, job)[0]["log_ratio_abs"] > 0.02  # of the epochs that follow too
    else:
        with pytest.raises(AssertionError, match=r"first update is 0.02, above 0.001"):
            on_layout(model_dir, job)


def test_the_native_engine_samples_in_bf16(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the layers compute in FP8, of which one decoded position has too few rows."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("FP8")

    monkeypatch.setattr(transformer_block, "get_fp8_context", refuse)

    def job(policy: Policy) -> int:
        policy.bridge.config.fp8, policy.bridge.config.fp8_recipe = "hybrid", Fp8Recipe.tensorwise
        with pytest.raises(RuntimeError, match="FP8"):
            compute_logprobs(policy, pack_for(policy, make_groups()))
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        sample = native_engine(policy, tokenizer)._sample  # type: ignore[attr-defined]
        ids, _ = sample([[1, 2]], uniforms=torch.full((1, 3), 0.5), stop_id=36, temperature=1.0)
        return len(ids[0])

    assert on_layout(model_dir, job)[0] > 0


@pytest.mark.parametrize("policy_loss", ["clip", "clip+kl"])
def test_weights_in_fp8_have_no_reference_policy(tmp_path: Path, policy_loss: str) -> None:
    options = ["policy.distributed_optimizer=true", "policy.options.fp8_params=true"]
    config = config_of(tmp_path, *options, f"algorithm.policy_loss={policy_loss}")
    if policy_loss == "clip":
        check_reference(config)
    else:
        with pytest.raises(
            ConfigError, match=r"fp8_params=true does not go with algorithm.policy_loss=clip\+kl"
        ):
            check_reference(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU refuses")
@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ([], "policy.precision=fp8_tensorwise needs a GPU, and there is none"),
        (
            ["policy.precision=bf16", "rollout.engine=vllm", "rollout.precision=fp8"],
            r"rollout.precision=fp8 needs a GPU of compute capability 8.9 or higher",
        ),
    ],
)
def test_a_run_is_refused_before_anything_is_loaded(tmp_path: Path, overrides: list[str], match: str) -> None:
    config = config_of(tmp_path, *overrides)
    with pytest.raises(ConfigError, match=match):
        _check_start(config, tmp_path, 1)


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU refuses")
@pytest.mark.skipif(not vllm_is_available(), reason="vllm is not installed")
def test_a_server_is_refused_too(tmp_path: Path) -> None:
    options = ["policy.precision=bf16", "rollout.engine=servers", "rollout.precision=fp8"]
    with pytest.raises(ConfigError, match=r"rollout.precision=fp8 needs a GPU"):
        _engine(config_of(tmp_path, *options, "rollout.seed_per_request=true"), tmp_path, "127.0.0.1")


def test_a_run_packs_by_the_multiple_of_its_recipe(tmp_path: Path) -> None:
    options = ["policy.precision=fp8_blockwise", "policy.tensor_parallel=2", "policy.sequence_parallel=true"]
    layout: Any = SimpleNamespace(
        data_parallel_rank=0,
        data_parallel=1,
        context_parallel_rank=0,
        context_parallel=1,
        micro_batch_multiple=1,
    )
    packed = _pack_layout(config_of(tmp_path, *options), layout)
    assert packed.multiple == 256
    ((batch,),) = pack(make_groups(), layout=packed, prompts_per_update=4, seed=1)
    assert len(batch.tokens) == 256 and int(batch.cu_seqlens[-1]) == 256
