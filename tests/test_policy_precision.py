"""policy.precision in megatron-core's words: the real dataclasses take every row, and the head stays outside FP8.

Without Transformer Engine megatron-core builds the whole model under an FP8 configuration and enters an empty context
where FP8 would be: what is FP8 and what is not can be seen, what it computes can not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import fp8_utils, tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer import TransformerConfig, transformer_block
from megatron.core.transformer.enums import AttnBackend
from policy_fixtures import (
    assert_same_weights,
    copied_weights,
    fp32,
    make_groups,
    on_layout,
    pack_for,
    save_model,
)
from ranks import run_on_ranks

from megatron_fec.config import ConfigError, OptimizerConfig, PolicyConfig
from megatron_fec.policy.fp8_weights import plain_weights
from megatron_fec.policy.megatron_settings import megatron_settings
from megatron_fec.policy.model import build_bridge, load_hf_config
from megatron_fec.policy.nonfinite import GradientWatch
from megatron_fec.policy.optimizer import build_optimizer, wrap_ddp
from megatron_fec.policy.parallel import check_model_sizes, initialize_parallel
from megatron_fec.policy.precision import ddp_precision, optimizer_precision, transformer_precision
from megatron_fec.policy.precision_check import in_bf16
from megatron_fec.policy.step import Policy, cores, token_statistics
from megatron_fec.policy_options import FP8, PRECISIONS

ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "params": {"fp8_params": True},
    "ends": {"fp8_bf16_layers_at_start": 1, "fp8_bf16_layers_at_end": 1},
    "start": {"fp8_bf16_layers_at_start": 1},
    "params and ends": {"fp8_params": True, "fp8_bf16_layers_at_end": 1},
    "amax": {"fp8_amax_history": 16, "fp8_amax": "most_recent"},
}


def rows() -> list[tuple[str, str]]:
    """(precision, row) of all pairs that the rules allow."""
    found = [("bf16", "plain"), ("fp32", "plain")]
    for precision in FP8:
        for name in ROWS:
            is_delayed = precision == "fp8_delayed"
            if (name == "amax" and not is_delayed) or (("ends" in name or name == "start") and is_delayed):
                continue
            found.append((precision, name))
    return found


def policy_of(precision: str, row: str = "plain") -> PolicyConfig:
    return PolicyConfig(precision=precision, options=ROWS[row], distributed_optimizer=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def test_the_rows_cover_every_precision() -> None:
    assert {precision for precision, _ in rows()} == set(PRECISIONS)


def test_megatrons_own_dataclasses_take_every_row(model_dir: Path) -> None:
    """All of TransformerConfig, its checks included, by the bridge that builds a run's; then DDP's and the optimizer's."""

    def job(rank: int) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
        initialize_parallel(fp32(), seed=3)
        found = []
        for precision, row in rows():
            policy = policy_of(precision, row)
            config = build_bridge(load_hf_config(str(model_dir)), policy).config
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, **ddp_precision(policy))
            optimizer = MegatronOptimizerConfig(
                bf16=precision != "fp32", use_distributed_optimizer=True, **optimizer_precision(policy)
            )
            names = ("fp8", "fp8_param", "first_last_layers_bf16", "bf16", "fp8_wgrad", "tp_only_amax_red")
            found.append(
                (
                    {n: getattr(config, n) for n in names}
                    | {
                        "recipe": config.fp8_recipe.value if config.fp8 else None,
                        "ends": (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16),
                        "amax": (config.fp8_amax_history_len, config.fp8_amax_compute_algo),
                        "dot": (config.fp8_dot_product_attention, config.fp8_multi_head_attention),
                        "output": getattr(config, "fp8_output_proj", False),
                    },
                    {n: getattr(ddp, n) for n in ("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag")},
                    {n: getattr(optimizer, n) for n in ("fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag")},
                )
            )
        return found

    (found,) = run_on_ranks(1, job)
    names = {
        "fp8_delayed": ("hybrid", "delayed"),
        "fp8_tensorwise": ("hybrid", "tensorwise"),
        "fp8_blockwise": ("e4m3", "blockwise"),
        "mxfp8": ("e4m3", "mxfp8"),
    }
    for (precision, row), (config, ddp, optimizer) in zip(rows(), found, strict=True):
        options, is_params = ROWS[row], "params" in row
        assert (config["fp8"], config["recipe"]) == names.get(precision, (None, None))
        assert config["bf16"] == (precision != "fp32")  # the dtype of all that is not FP8
        assert config["fp8_param"] == ddp["fp8_param_gather"] == is_params
        reuses = is_params and precision == "mxfp8"
        assert (
            ddp["reuse_grad_buf_for_mxfp8_param_ag"]
            == optimizer["reuse_grad_buf_for_mxfp8_param_ag"]
            == reuses
        )
        assert optimizer["fp8_recipe"] == (config["recipe"] if is_params else None)
        ends = tuple(options.get(f"fp8_bf16_layers_at_{end}", 0) for end in ("start", "end"))
        assert config["first_last_layers_bf16"] == (sum(ends) > 0)
        assert sum(ends) == 0 or config["ends"] == ends
        if precision == "fp8_delayed":
            assert config["amax"] == ((16, "most_recent") if row == "amax" else (1024, "max"))
        assert config["fp8_wgrad"] and not config["tp_only_amax_red"]
        assert config["dot"] == (False, False) and not config["output"]


@pytest.mark.parametrize("precision", FP8)
def test_every_field_exists_in_this_line(precision: str) -> None:
    row = "params" if precision == "fp8_delayed" else "params and ends"
    known = {
        TransformerConfig: transformer_precision(policy_of(precision, row)),
        DistributedDataParallelConfig: ddp_precision(policy_of(precision, row)),
        MegatronOptimizerConfig: optimizer_precision(policy_of(precision, row)),
    }
    for dataclass, mapped in known.items():
        assert mapped and set(mapped) <= {field.name for field in fields(dataclass)}


def test_the_settings_name_no_output_projection_in_fp8() -> None:
    for precision in PRECISIONS:
        settings = megatron_settings(policy_of(precision))
        assert not {"fp8_output_proj", "fp8_dot_product_attention", "fp8_multi_head_attention"} & set(
            settings
        )


def test_a_checkpoint_is_checked_with_its_layout() -> None:
    """By the function that preflight, the dry run and the model share; 18944 / 4 is a multiple of 16, 18960 / 4 is not."""
    sizes = {
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
    }
    policy = PolicyConfig(precision="fp8_blockwise", tensor_parallel=4)
    check_model_sizes(SimpleNamespace(**sizes, intermediate_size=18944), policy)
    with pytest.raises(ConfigError, match=r"intermediate_size is 4740 at policy.tensor_parallel=4"):
        check_model_sizes(SimpleNamespace(**sizes, intermediate_size=18960), policy)


def test_ddp_and_optimizer_are_built_from_them(model_dir: Path) -> None:
    """By the functions of a run, around a model whose weights are bf16."""

    def job(policy: Policy) -> list[tuple[Any, ...]]:
        core: Any = cores(policy)[0]
        found = []
        for row in ("plain", "params"):
            settings = policy_of("mxfp8", row)
            ddp = wrap_ddp([core], policy.bridge.config, settings, GradientWatch())
            optimizer, _ = build_optimizer(ddp, settings, OptimizerConfig(), total_steps=3)
            config = optimizer.config
            found.append((ddp[0].ddp_config.fp8_param_gather, config.fp8_recipe, config.bf16))
        return found

    bf16 = PolicyConfig(precision="bf16", distributed_optimizer=True, micro_batch_tokens=512)
    (found,) = on_layout(model_dir, job, bf16)
    assert found == [(False, None, True), (True, "mxfp8", True)]


class Watch:
    """Where megatron-core's FP8 context is entered, and whether it is open while the head computes."""

    def __init__(self) -> None:
        self.layers: list[int] = []  # -1: around all of them
        self.is_open = False
        self.head: list[bool] = []

    def context(self, config: TransformerConfig, layer: int = -1, is_init: bool = False) -> Any:
        """In place of get_fp8_context, with its own rule of which layers it leaves out."""
        assert config.fp8
        if fp8_utils.is_first_last_bf16_layer(config, layer):
            return open_if(self, None)
        return open_if(self, layer)


@contextmanager
def open_if(watch: Watch, layer: int | None) -> Iterator[None]:
    if layer is None:
        yield
        return
    watch.layers.append(layer)
    watch.is_open = True
    yield
    watch.is_open = False


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize(
    ("precision", "options", "wanted"),
    [
        ("fp8_tensorwise", {}, [0, 1]),
        ("fp8_blockwise", {"fp8_bf16_layers_at_end": 1}, [0]),
        ("fp8_delayed", {}, [-1]),
        ("mxfp8", {"fp8_bf16_layers_at_start": 1}, [1]),
    ],
)
def test_the_head_is_outside_of_fp8(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    options: dict[str, Any],
    wanted: list[int],
    chunk: int | None,
) -> None:
    """Only the layers enter the context; the output layer, whole or in chunks, and the statistics do not, nor does bf16."""
    watch = Watch()
    monkeypatch.setattr(transformer_block, "get_fp8_context", watch.context)

    def job(policy: Policy) -> None:
        core: Any = cores(policy)[0]
        settings = transformer_precision(PolicyConfig(precision=precision, options=options))
        assert core.config is policy.bridge.config
        for name, value in settings.items():  # build_policy refuses FP8 here, so it is set afterwards
            setattr(policy.bridge.config, name, value)
        assert type(core.output_layer) is tensor_parallel.ColumnParallelLinear
        own = core._postprocess

        def postprocess(*args: Any, **kwargs: Any) -> Any:
            watch.head.append(watch.is_open)
            return own(*args, **kwargs)

        core._postprocess = postprocess
        ((batch,),) = pack_for(policy, make_groups())
        token_statistics(policy, [batch], second_moments=False)
        assert watch.layers == wanted and watch.head == [False]
        watch.layers.clear()
        with in_bf16(policy):
            token_statistics(policy, [batch], second_moments=False)
        assert watch.layers == [] and policy.bridge.config.fp8 == settings["fp8"]

    on_layout(model_dir, job, fp32(logits_chunk_tokens=chunk))


def test_the_spec_of_transformer_engine_takes_what_we_give_it() -> None:
    """layer_spec.py calls it on a GPU alone."""
    inspect.signature(get_gpt_layer_with_transformer_engine_spec).bind(qk_layernorm=True)
    assert {"auto", "flash", "fused", "unfused"} <= {backend.name for backend in AttnBackend}


def test_weights_in_fp8_are_plain_inside_the_block(model_dir: Path) -> None:
    """With matrices for FP8 and half their values for what FP8 keeps of them."""

    def is_matrix(weight: torch.Tensor) -> bool:
        return weight.ndim == 2

    def job(policy: Policy) -> None:
        core = cores(policy)[0]
        names = {id(p): n for n, p in core.named_parameters()}
        before = copied_weights(policy)
        own = {id(p): p.detach().clone() for p in core.parameters()}
        with plain_weights([core], is_quantized=is_matrix, dequantize=lambda x: x / 2):
            inside = copied_weights(policy)
            marks = [p.partition_dim for p in core.parameters() if p.ndim == 2 and p.numel() > 9]  # type: ignore[attr-defined]
            assert set(marks) == {0, 1}
        halved = {n: t / 2 if t.ndim == 2 else t for n, t in before.items()}
        assert_same_weights(inside, halved)
        assert_same_weights(copied_weights(policy), before)  # reading changes nothing
        assert {id(p): n for n, p in core.named_parameters()} == names  # the very same objects
        for weight in core.parameters():
            weight.get_high_precision_init_val = lambda: None  # type: ignore[attr-defined]
        with (
            plain_weights([core], keep=True, is_quantized=is_matrix, dequantize=lambda x: x.clone()),
            torch.no_grad(),
        ):
            for weight in core.parameters():
                weight.mul_(4)
        for weight in core.parameters():
            torch.testing.assert_close(weight.detach(), own[id(weight)] * 4, rtol=0, atol=0)
            kept = getattr(weight, "_high_precision_init_val", None)
            assert (kept is not None) == is_matrix(weight)
            assert kept is None or torch.equal(kept, weight.detach())

    on_layout(model_dir, job)
