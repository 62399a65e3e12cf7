"""Every row of the layout and speed options against megatron-core's own dataclasses, and what is refused."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, optimizer_config
from megatron.core.transformer import TransformerConfig

from megatron_fec.config import ConfigError, PolicyConfig
from megatron_fec.policy.checkpoint import without_classes
from megatron_fec.policy.layout_settings import (
    check_devices,
    ddp_settings,
    layout_settings,
    optimizer_settings,
)
from megatron_fec.policy.megatron_settings import megatron_settings
from megatron_fec.policy.parallel import check_model_sizes
from megatron_fec.policy_options import check_policy

TP2_SP: dict[str, Any] = {"tensor_parallel": 2, "sequence_parallel": True}
SIZES = {
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "hidden_size": 96,
    "num_hidden_layers": 12,
}


def policy(options: dict[str, Any] | None = None, **settings: Any) -> PolicyConfig:
    chosen = PolicyConfig(options=options or {}, **settings)
    check_policy(chosen)
    return chosen


def transformer_config(chosen: PolicyConfig) -> TransformerConfig:
    """megatron-core's own, of a model of SIZES in this layout."""
    virtual = chosen.options.get("virtual_stages", 1)
    is_bf16 = chosen.precision != "fp32"
    return TransformerConfig(
        num_layers=SIZES["num_hidden_layers"],
        hidden_size=SIZES["hidden_size"],
        num_attention_heads=SIZES["num_attention_heads"],
        num_query_groups=SIZES["num_key_value_heads"],
        tensor_model_parallel_size=chosen.tensor_parallel,
        pipeline_model_parallel_size=chosen.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=chosen.context_parallel,
        pipeline_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        bf16=is_bf16,
        **megatron_settings(chosen),
    )


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (policy(), {"tp_comm_overlap": False, "overlap_p2p_comm": False, "cp_comm_type": None}),
        (policy({"tp_overlap": True}, **TP2_SP), {"tp_comm_overlap": True, "sequence_parallel": True}),
        (policy(context_parallel=4), {"cp_comm_type": "p2p", "context_parallel_size": 4}),
        (
            policy({"virtual_stages": 3}, pipeline_parallel=4),
            {
                "virtual_pipeline_model_parallel_size": 3,
                "overlap_p2p_comm": True,
                "batch_p2p_comm": False,
                "microbatch_group_size_per_vp_stage": 4,
            },
        ),
        (policy({"recompute": "selective"}), {"recompute_modules": ["core_attn"]}),
        *(
            (
                policy({"recompute": "full", **options}, **settings),
                {
                    "recompute_granularity": "full",
                    "recompute_method": "uniform",
                    "recompute_num_layers": 1,
                },
            )
            for options, settings in (
                ({}, {}),
                ({"virtual_stages": 2}, {"pipeline_parallel": 2, **TP2_SP}),
                ({}, {"context_parallel": 2, "pipeline_parallel": 2}),
            )
        ),
        *(
            (
                policy({"recompute": "selective", **options}, **settings),
                {"recompute_granularity": "selective", "recompute_method": None},
            )
            for options, settings in (
                ({"virtual_stages": 2}, {"pipeline_parallel": 2, **TP2_SP}),
                ({}, {"context_parallel": 2, **TP2_SP}),
            )
        ),
    ],
    ids=lambda part: str({**part.options}) if isinstance(part, PolicyConfig) else "",
)
def test_fields_of_the_transformer_config(chosen: PolicyConfig, wanted: dict[str, Any]) -> None:
    config = transformer_config(chosen)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize("is_distributed", [True, False])
@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("overlap", [True, False])
def test_fields_of_the_ddp_config(is_distributed: bool, virtual: int, overlap: bool) -> None:
    chosen = policy(
        {"overlap": overlap, "virtual_stages": virtual},
        distributed_optimizer=is_distributed,
        pipeline_parallel=2,
    )
    config = DistributedDataParallelConfig(**ddp_settings(chosen))
    assert config.use_distributed_optimizer == is_distributed and config.grad_reduce_in_fp32
    assert config.overlap_grad_reduce == overlap
    assert config.overlap_param_gather == (overlap and is_distributed)
    assert config.align_param_gather == (overlap and is_distributed and virtual == 2)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"use_precision_aware_optimizer": False, "optimizer_cpu_offload": False}),
        ({"overlap": True}, {"overlap_param_gather": True}),
        (
            {"optimizer_on_host": 0.25},
            {
                "optimizer_cpu_offload": True,
                "optimizer_offload_fraction": 0.25,
                "use_precision_aware_optimizer": True,
                "overlap_cpu_optimizer_d2h_h2d": False,
                "exp_avg_dtype": torch.float32,
            },
        ),
        (
            {"optimizer_on_host": 1.0, "overlap": True},
            {"optimizer_offload_fraction": 1.0, "overlap_cpu_optimizer_d2h_h2d": True},
        ),
    ],
)
def test_fields_of_the_optimizer_config(
    options: dict[str, Any], wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda least: True)
    config = OptimizerConfig(bf16=True, **optimizer_settings(policy(options)))
    assert config.use_distributed_optimizer
    assert {name: getattr(config, name) for name in wanted} == wanted


class FusedAdam:
    """The signature that megatron-core looks for in Transformer Engine's optimizer."""

    def __init__(
        self, master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any, use_decoupled_grad: bool
    ) -> None: ...


@pytest.mark.parametrize(("name", "dtype"), [("bf16_moments", torch.bfloat16), ("fp8_moments", torch.uint8)])
def test_narrower_moments_need_transformer_engine(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron-core says so itself where it is absent; where it has a FusedAdam the fields are taken."""
    settings = optimizer_settings(policy({"optimizer_precision": name}))
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda least: True)
    with pytest.raises(RuntimeError, match="requires FusedAdam from TransformerEngine"):
        OptimizerConfig(bf16=True, **settings)
    for module in (
        "transformer_engine",
        "transformer_engine.pytorch",
        "transformer_engine.pytorch.optimizers",
    ):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    sys.modules["transformer_engine.pytorch.optimizers"].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    config = OptimizerConfig(bf16=True, **settings)
    assert config.exp_avg_dtype == config.exp_avg_sq_dtype == dtype
    assert config.main_params_dtype == config.main_grads_dtype == torch.float32
    assert config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (
            {"virtual_stages": 2},
            {},
            r"virtual_stages=2 needs policy\.pipeline_parallel > 1: .* Set it to 1\.",
        ),
        (
            {"tp_overlap": True},
            {"tensor_parallel": 2},
            r"tp_overlap=true needs policy\.sequence_parallel=true .* Set that, or tp_overlap=false\.",
        ),
        (
            {"tp_overlap": True},
            {**TP2_SP, "context_parallel": 2, "micro_batch_tokens": 1002},
            r"micro_batch_tokens=1002 must be a multiple of 4 with policy\.options\.tp_overlap=true.* Use 1004\.",
        ),
        (
            {"tp_overlap": True},
            {**TP2_SP, "micro_batch_tokens": 1008, "precision": "mxfp8"},
            r"micro_batch_tokens=1008 must be a multiple of 256 with policy\.options\.tp_overlap=true.* Use 1024\.",
        ),
        (
            {"optimizer_precision": "bf16_moments"},
            {"distributed_optimizer": False},
            r"optimizer_precision=bf16_moments needs policy\.distributed_optimizer=true.* or optimizer_precision=fp32\.",
        ),
        (
            {"optimizer_on_host": 0.5},
            {"distributed_optimizer": False},
            r"optimizer_on_host=0\.5 needs policy\.distributed_optimizer=true.* or optimizer_on_host=0\.",
        ),
        (
            {"optimizer_on_host": 0.5},
            {"precision": "fp32"},
            r"optimizer_on_host=0\.5 needs bf16 weights .* Use policy\.precision=bf16, or optimizer_on_host=0\.",
        ),
        (
            {"optimizer_on_host": 0.5, "optimizer_precision": "fp8_moments"},
            {},
            r"optimizer_precision=fp8_moments and optimizer_on_host=0\.5 exclude each other.*Choose one\.",
        ),
    ],
)
def test_options_that_lack_another_are_refused(
    options: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(options, **settings)


def test_overlap_of_one_rank_is_allowed() -> None:
    policy({"overlap": True})
    policy({"overlap": True}, distributed_optimizer=False)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "message"),
    [
        (
            16,
            1,
            r"pipeline_parallel=16 exceeds the checkpoint's num_hidden_layers=12: .* Use at most 12 in all",
        ),
        (
            4,
            4,
            r"pipeline_parallel=4 x policy\.options\.virtual_stages=4 = 16 exceeds .*=12: a stage would have",
        ),
        (
            5,
            1,
            r"pipeline_parallel=5 must divide the checkpoint's num_hidden_layers=12\. Use one of 1, 2, 3, 4, 6\.",
        ),
        (
            2,
            4,
            r"virtual_stages=4 = 8 must divide .*num_hidden_layers=12\. Use virtual_stages of 1, 2, 3, 6\.",
        ),
    ],
)
def test_stages_must_divide_the_layers(pipeline: int, virtual: int, message: str) -> None:
    chosen = policy({"virtual_stages": virtual}, pipeline_parallel=pipeline)
    with pytest.raises(ConfigError, match=message):
        check_model_sizes(SimpleNamespace(**SIZES), chosen)


@pytest.mark.parametrize(("pipeline", "virtual"), [(12, 1), (2, 6), (4, 3), (3, 2)])
def test_stages_that_divide_the_layers_are_taken(pipeline: int, virtual: int) -> None:
    chosen = policy({"virtual_stages": virtual}, pipeline_parallel=pipeline)
    check_model_sizes(SimpleNamespace(**SIZES), chosen)
    transformer_config(chosen)


@pytest.mark.parametrize(
    ("chosen", "has_gpu", "message"),
    [
        (
            policy(context_parallel=2),
            True,
            r"context_parallel=2 needs Transformer Engine's attention on a GPU, .* Install the extra gpu, or set it to 1",
        ),
        (
            policy({"tp_overlap": True}, **TP2_SP),
            True,
            r"tp_overlap=true needs .* Transformer Engine is not installed.* to false, or install the extra gpu\.",
        ),
        (
            policy({"tp_overlap": True}, **TP2_SP),
            False,
            r"tp_overlap=true needs .* no GPU\. Set it to false\.",
        ),
        (
            policy({"optimizer_precision": "bf16_moments"}),
            False,
            r"optimizer_precision=bf16_moments needs .* FusedAdam on GPUs, .* no GPU\. Set it to fp32\.",
        ),
        (
            policy({"optimizer_on_host": 0.5}),
            False,
            r"optimizer_on_host=0\.5 moves .* no GPU: it is on the host already\. Set it to 0\.",
        ),
        (
            policy({"optimizer_on_host": 0.5}),
            True,
            r"optimizer_on_host=0\.5 needs Transformer Engine, .* Set it to 0, or install the extra gpu\.",
        ),
    ],
    ids=["cp", "tp_overlap_without_te", "tp_overlap_on_cpu", "moments", "host_on_cpu", "host_without_te"],
)
def test_what_the_machine_cannot_do_is_refused(chosen: PolicyConfig, has_gpu: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_devices(chosen, has_gpu=has_gpu, has_transformer_engine=False)
    check_devices(chosen, has_gpu=True, has_transformer_engine=True)


def test_what_needs_no_gpu_is_taken_without_one() -> None:
    chosen = policy({"overlap": True, "virtual_stages": 2}, pipeline_parallel=2, context_parallel=2)
    check_devices(chosen, has_gpu=False, has_transformer_engine=False)


def test_a_checkpoint_holds_no_classes() -> None:
    """Those of megatron-core's host optimizer stand in its parameter groups."""
    group = {"lr": 0.1, "cpu_optimizer_cls": torch.optim.AdamW, "betas": (0.9, 0.99)}
    kept = {"lr": 0.1, "betas": (0.9, 0.99)}
    tensor = torch.ones(2)
    state = {0: {"param_groups": [group], "state": tensor}, "step": 3}
    assert without_classes(state) == {0: {"param_groups": [kept], "state": tensor}, "step": 3}
    assert without_classes(state)[0]["state"] is tensor and "cpu_optimizer_cls" in group


def test_the_layout_says_nothing_that_is_off() -> None:
    assert layout_settings(policy()) == {}
