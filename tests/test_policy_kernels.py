"""Which kernels of others a run uses: decided by what is installed, told at its start, refused where one is absent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.enums import AttnBackend
from policy_fixtures import fp32, on_layout, save_model

from megatron_fec.config import ConfigError, PolicyConfig
from megatron_fec.policy.kernels import Installed, check_kernels, experts_line, kernel_lines, kernel_settings
from megatron_fec.policy.step import Policy, build_policy

GPU = Installed(
    capability=(9, 0),
    cuda="12.9",
    transformer_engine="2.14.0",
    flash_attention="flash-attn 2.8.1",
    fused_rope=True,
    fused_wgrad=True,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU has")
@pytest.mark.parametrize("distributed", [False, True])
def test_the_log_of_a_run_without_a_gpu(model_dir: Path, distributed: bool) -> None:
    def job(policy: Policy) -> list[str]:
        settings = fp32(distributed_optimizer=distributed)
        return kernel_lines(settings, policy.bridge.config, policy.optimizer)

    (lines,) = on_layout(model_dir, job, fp32(distributed_optimizer=distributed))
    found = {line[:17].strip(): line[18:] for line in lines}
    assert found == {
        "precision": "fp32",
        "layers": "megatron-core's local ones; Transformer Engine is not in use",
        "attention": "torch's, one padded row a sequence",
        "RoPE": "megatron-core's, not fused",
        "gradient fusion": "none",
        "experts": "none",
        "optimizer": "AdamW of torch",
        "token statistics": "torch kernel",
    }
    assert megatron_optimizer.USING_PYTORCH_OPTIMIZER  # what megatron-core says of itself
    assert rope_utils.fused_apply_rotary_pos_emb_thd is None


@pytest.mark.parametrize("attention", ["auto", "flash", "fused", "unfused"])
def test_what_is_there_is_used(attention: str) -> None:
    chosen = PolicyConfig(options={"attention": attention})
    check_kernels(chosen, GPU)
    assert kernel_settings(chosen, GPU) == {
        "apply_rope_fusion": True,
        "gradient_accumulation_fusion": True,
        "attention_backend": AttnBackend[attention],
    }


@pytest.mark.parametrize(
    ("absent", "wanted"),
    [
        ({"fused_rope": False}, (False, True)),
        ({"fused_wgrad": False}, (True, False)),
        # The local layers could fuse with apex as well; they are for development, and stay as they are tested.
        ({"transformer_engine": None, "fused_rope": False}, (False, False)),
    ],
)
def test_what_is_absent_is_not(absent: dict[str, Any], wanted: tuple[bool, bool]) -> None:
    settings = kernel_settings(PolicyConfig(), replace(GPU, **absent))
    assert (settings["apply_rope_fusion"], settings["gradient_accumulation_fusion"]) == wanted
    assert ("attention_backend" in settings) == ("transformer_engine" not in absent)


@pytest.mark.parametrize(
    ("settings", "absent", "match"),
    [
        (
            {"attention": "flash"},
            {"transformer_engine": None},
            "attention=flash is a choice of Transformer Engine",
        ),
        (
            {"attention": "flash"},
            {"flash_attention": None},
            "attention=flash needs flash-attn, .* or use fused",
        ),
        (
            {"attention": "unfused"},
            {"transformer_engine": "2.10.0"},
            "no packed sequences before Transformer Engine 2.11",
        ),
        (
            {"attention": "fused", "precision": "fp32"},
            {},
            "precision=fp32 with policy.options.attention=fused",
        ),
        (
            {"precision": "fp32"},
            {"transformer_engine": "2.9"},
            "2.11 or newer, computes packed sequences in fp32",
        ),
        (
            {"attention": "unfused", "context_parallel": 2},
            {},
            "context_parallel=2 with .* does not split sequences",
        ),
        ({"precision": "fp32", "context_parallel": 2}, {}, "context_parallel=2 with policy.precision=fp32"),
        (
            {"context_parallel": 2},
            {"transformer_engine": None},
            "context_parallel=2 needs Transformer Engine's attention",
        ),
        (
            {},
            {"engine_is_broken": True, "transformer_engine": None},
            "is installed, and megatron-core could not import",
        ),
        ({"precision": "mxfp8"}, {}, "needs a GPU of compute capability 10.0"),
        (
            {"precision": "fp8_tensorwise"},
            {"transformer_engine": None},
            "needs Transformer Engine, which is not",
        ),
    ],
)
def test_a_kernel_that_is_absent_is_refused(
    settings: dict[str, Any], absent: dict[str, Any], match: str
) -> None:
    options = {name: settings[name] for name in settings if name == "attention"}
    fields = {name: settings[name] for name in settings if name != "attention"}
    chosen = PolicyConfig(**fields, options=options)
    with pytest.raises(ConfigError, match=match):
        check_kernels(chosen, replace(GPU, **absent))


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "fp32"}, {"precision": "fp8_blockwise"}, {"precision": "fp8_delayed"}]
)
def test_a_gpu_with_all_of_them_computes(settings: dict[str, Any]) -> None:
    check_kernels(PolicyConfig(**settings), GPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU refuses")
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"precision": "fp8_blockwise"}, "policy.precision=fp8_blockwise needs a GPU, and there is none"),
        ({"options": {"attention": "fused"}}, "attention=fused is a choice of Transformer Engine"),
    ],
)
def test_a_policy_is_not_built_without_its_kernels(
    model_dir: Path, settings: dict[str, Any], match: str
) -> None:
    """Before the checkpoint is read, so that no process group is needed."""
    with pytest.raises(ConfigError, match=match):
        build_policy(
            str(model_dir / "absent"),
            PolicyConfig(**settings),
            None,  # type: ignore[arg-type]
            layout=None,  # type: ignore[arg-type]
            temperature=1.0,
            total_steps=1,
            vocab_size=37,
        )


def test_the_log_of_a_gpu(model_dir: Path) -> None:
    """The lines that only a GPU has, of a configuration as it would be built there."""

    def job(policy: Policy) -> list[str]:
        config = policy.bridge.config
        config.attention_backend, config.apply_rope_fusion = AttnBackend.flash, True
        config.fp8, config.fp8_recipe, config.fp8_param = "e4m3", Fp8Recipe.blockwise, True
        config.gradient_accumulation_fusion = True
        lines = kernel_lines(
            PolicyConfig(precision="fp8_blockwise"), config, policy.optimizer, replace(GPU, capability=None)
        )
        config.num_moe_experts, config.moe_grouped_gemm = 4, True
        experts = [experts_line(config, version) for version in ("2.14.0", None)]
        config.moe_grouped_gemm = False
        return [*lines, *experts, experts_line(config, None)]

    (lines,) = on_layout(model_dir, job)
    assert [line[18:] for line in lines[:5]] == [
        "fp8_blockwise (megatron-core's blockwise, e4m3; weights in FP8)",
        "Transformer Engine 2.14.0 with fused norms",
        "flash, by Transformer Engine; flash-attn 2.8.1",
        "Transformer Engine's, fused",
        "apex's",
    ]
    assert lines[-3:] == [
        "grouped GEMM, Transformer Engine's",
        "grouped GEMM, megatron-core's",
        "one product an expert",
    ]
