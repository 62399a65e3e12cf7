"""What a user meets when the checkpoint, the layout and the world do not fit together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from policy_fixtures import LLAMA3_ROPE, ROPES, fp32, save_model
from ranks import run_on_ranks
from transformers import AutoConfig, GPT2Config

from megatron_fec.config import ConfigError, PolicyConfig
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.parallel import check_model_sizes, check_world, initialize_parallel

SIZES = {
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "hidden_size": 96,
    "num_hidden_layers": 6,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model(tmp_path, "llama")


def changed(folder: Path, **settings: Any) -> str:
    """The checkpoint with these values in its config.json."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in settings.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        LLAMA3_ROPE | {"low_freq_factor": 2.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ],
)
def test_an_unsupported_rope_is_refused(llama: Path, rope: dict[str, Any]) -> None:
    kind = rope["rope_type"]
    with pytest.raises(
        ConfigError, match=rf"rope_parameters=.*{kind}.* not supported; use default, linear or llama3"
    ):
        load_hf_config(changed(llama, rope_parameters=rope))


@pytest.mark.parametrize("kind", list(ROPES))
def test_the_supported_ropes_are_not(tmp_path: Path, kind: str) -> None:
    assert load_hf_config(str(save_model(tmp_path, kind))).model_type == "llama"


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True)]
)
def test_a_variant_that_would_load_as_another_model_is_refused(llama: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"has {name}={value}; only {name}=\w+ is supported"):
        load_hf_config(changed(llama, **{name: value}))


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "qwen2")
    assert load_hf_config(str(folder)).model_type == "qwen2"
    path = changed(folder, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ConfigError, match="has use_sliding_window=True"):
        load_hf_config(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a gpt2 model; supported are qwen2, qwen3, qwen3_moe, llama\."):
        load_hf_config(str(tmp_path))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.path=.* holds no readable Hugging Face checkpoint.*config\.json"
    ):
        load_hf_config(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "tensor", "remedy"),
    [
        ("num_attention_heads", 5, "1, 2, 3, 4, 6"),
        ("num_key_value_heads", 3, "1, 2, 4"),
        ("intermediate_size", 4, "1, 2, 3, 5, 6"),
        ("hidden_size", 4, "1, 2, 3, 5, 6"),
    ],
)
def test_tensor_parallel_must_divide_the_sizes(name: str, tensor: int, remedy: str) -> None:
    sizes = SIZES | ({name: 90} if name.endswith("size") else {})
    with pytest.raises(
        ConfigError,
        match=rf"policy\.tensor_parallel={tensor} must divide the checkpoint's {name}={sizes[name]}\. Use one of {remedy}\.",
    ):
        check_model_sizes(SimpleNamespace(**sizes), fp32(tensor_parallel=tensor))


def test_pipeline_parallel_must_divide_the_layers() -> None:
    config = SimpleNamespace(**SIZES)
    check_model_sizes(config, fp32(tensor_parallel=4, pipeline_parallel=3))
    with pytest.raises(
        ConfigError,
        match=r"policy\.pipeline_parallel=4 must divide the checkpoint's num_hidden_layers=6\. Use one of 1, 2, 3, 6\.",
    ):
        check_model_sizes(config, fp32(pipeline_parallel=4))


def test_the_layout_must_fill_the_world() -> None:
    config = PolicyConfig(tensor_parallel=2, pipeline_parallel=3)
    check_world(config, world_size=12)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel=2 x policy\.pipeline_parallel=3 .*= 6 must divide the 8"
    ):
        check_world(config, world_size=8)


def test_a_layout_too_large_stops_on_every_rank() -> None:
    def job(rank: int) -> str:
        with pytest.raises(ConfigError) as error:
            initialize_parallel(fp32(tensor_parallel=4), seed=0)
        return str(error.value)

    messages = run_on_ranks(2, job)
    assert messages[0] == messages[1] and "must divide the 2 processes of this run" in messages[0]


def test_a_layout_knows_its_ranks() -> None:
    def job(rank: int) -> tuple[Any, ...]:
        layout = initialize_parallel(fp32(tensor_parallel=2), seed=0)
        return layout.data_parallel, layout.data_parallel_rank, layout.is_last_stage, layout.reports_metrics

    assert run_on_ranks(4, job) == [
        (2, 0, True, True),
        (2, 0, True, False),
        (2, 1, True, True),
        (2, 1, True, False),
    ]
