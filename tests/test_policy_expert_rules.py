"""What is refused of a mixture of experts: setting, value, rule and remedy, before a model is built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from policy_fixtures import fp32, save_model
from transformers import AutoConfig

from megatron_fec.config import ConfigError
from megatron_fec.policy.experts import check_expert_world, expert_settings, num_experts
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.parallel import check_model_sizes, check_world

DENSE = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 90,
    "hidden_size": 96,
    "num_hidden_layers": 6,
}
SPARSE = DENSE | {"num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 40}


def check(sizes: dict[str, Any], *, tensor_parallel: int = 1, **options: Any) -> None:
    """With sequence parallelism where there is tensor parallelism."""
    settings = fp32(
        tensor_parallel=tensor_parallel, sequence_parallel=tensor_parallel > 1, options=dict(options)
    )
    check_model_sizes(SimpleNamespace(**sizes), settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"expert_parallel": 5},
            r"policy\.options\.expert_parallel=5 must divide the checkpoint's num_experts=12\. Use "
            r"one of 1, 2, 3, 4, 6, 12\.",
        ),
        (
            {"expert_tensor_parallel": 3},
            r"policy\.options\.expert_tensor_parallel=3 must divide the checkpoint's moe_intermediate_size=40\. Use one "
            r"of 1, 2, 4, 5, 8, 10, 20, 40\.",
        ),
    ],
)
def test_the_layout_must_divide_the_experts(options: dict[str, Any], message: str) -> None:
    check(SPARSE, expert_parallel=4, expert_tensor_parallel=5)
    with pytest.raises(ConfigError, match=message):
        check(SPARSE, **options)


def test_tensor_parallel_need_not_divide_a_width_that_is_not_used() -> None:
    check(SPARSE, tensor_parallel=4)  # 90 is no multiple of it
    with pytest.raises(
        ConfigError, match=r"tensor_parallel=4 must divide the checkpoint's intermediate_size=90"
    ):
        check(DENSE, tensor_parallel=4)


def test_tensor_parallel_experts_need_sequence_parallelism() -> None:
    settings = fp32(tensor_parallel=2)
    with pytest.raises(
        ConfigError,
        match=r"policy\.tensor_parallel=2 of a mixture of experts needs policy\.sequence_parallel=true: .* Set it\.",
    ):
        check_model_sizes(SimpleNamespace(**SPARSE), settings)
    check_model_sizes(SimpleNamespace(**DENSE), settings)


@pytest.mark.parametrize("chosen", [1, 13])
def test_a_token_needs_some_of_the_experts(chosen: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"num_experts_per_tok={chosen} must be from 2 to its num_experts=12"
    ):
        check(SPARSE | {"num_experts_per_tok": chosen})


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("expert_parallel", 2, "1"),
        ("expert_tensor_parallel", 2, "1"),
        ("router", "replay", "live"),
        ("router_load_balance", 0.01, "0.0"),
    ],
)
def test_a_dense_model_has_no_use_for_options_of_experts(name: str, value: Any, neutral: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"policy\.options\.{name}={value} needs a mixture of experts, .* Set it to {neutral} or use another",
    ):
        check(DENSE, **{name: value})
    check(SPARSE, **{name: value})


def test_the_experts_must_fill_a_pipeline_stage() -> None:
    settings = fp32(pipeline_parallel=2, options={"expert_parallel": 2, "expert_tensor_parallel": 3})
    check_world(settings, world_size=12)
    check_expert_world(settings, world_size=24)
    with pytest.raises(
        ConfigError,
        match=r"expert_parallel=2 x policy\.options\.expert_tensor_parallel=3 = 6 must divide the 4 ranks of a pipeline "
        r"stage \(8 processes / policy\.pipeline_parallel=2\)\. Start more processes or share",
    ):
        check_world(settings, world_size=8)


@pytest.mark.parametrize(
    ("name", "value"), [("decoder_sparse_step", 2), ("mlp_only_layers", [1]), ("norm_topk_prob", False)]
)
def test_a_checkpoint_of_another_kind_of_mixture_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    folder = save_model(tmp_path, "qwen3_moe")
    assert num_experts(load_hf_config(str(folder))) == 4
    config = AutoConfig.from_pretrained(folder)
    setattr(config, name, value)
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=rf"has {name}=.*; only {name}=.* is supported"):
        load_hf_config(str(folder))


def test_grouped_products_are_transformer_engines(tmp_path: Path) -> None:
    """Without it the experts run one after another; with it in one product, on permuted tokens; a dense model has none."""
    sparse = SimpleNamespace(**SPARSE)
    for has_te in (False, True):
        settings = expert_settings(sparse, fp32(), has_te=has_te)
        assert settings["moe_grouped_gemm"] == settings["moe_permute_fusion"] == has_te
        assert settings["moe_expert_capacity_factor"] is None and settings["moe_router_dtype"] == "fp32"
    assert expert_settings(SimpleNamespace(**DENSE), fp32(), has_te=True) == {}
