"""What an FP8 recipe refuses: options, widths, tokens, GPUs and versions; every message names value, rule and remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fec.config import ConfigError, PolicyConfig, RolloutConfig
from megatron_fec.policy_options import FP8, PolicyOptions, check_policy
from megatron_fec.precision_rules import (
    FP8_OPTIONS,
    RECIPES,
    check_fp8_sizes,
    check_gpu,
    check_rollout_gpu,
    token_multiple,
    version_of,
)
from megatron_fec.server_config import check_servers

A100, RTX4090, H100, B200, RTX5090 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
QWEN7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
}


def policy(precision: str, **settings: Any) -> PolicyConfig:
    """A policy whose options are the keywords that PolicyConfig does not have."""
    own = {name for name in settings if name in PolicyConfig.__dataclass_fields__}
    return PolicyConfig(
        precision=precision,
        options={name: value for name, value in settings.items() if name not in own},
        **{"distributed_optimizer": True} | {name: settings[name] for name in own},
    )


def refused(precision: str, match: str, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        check_policy(policy(precision, **settings))


MOVED: dict[str, Any] = {
    "fp8_params": True,
    "fp8_bf16_layers_at_start": 1,
    "fp8_bf16_layers_at_end": 2,
    "fp8_amax_history": 16,
    "fp8_amax": "most_recent",
    "fp8_check_every": 5,
    "fp8_flip_limit": 0.1,
}


def test_the_options_of_fp8_are_those_that_are_declared() -> None:
    declared = {name for name in PolicyOptions.__dataclass_fields__ if name.startswith("fp8_")}
    assert set(FP8_OPTIONS) == declared == set(MOVED)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", FP8_OPTIONS)
def test_an_fp8_option_without_fp8_is_refused(name: str, precision: str) -> None:
    match = rf"policy.options.{name}={MOVED[name]} does nothing at policy.precision={precision}. Leave it out, or .*mxfp8"
    refused(precision, match, **{name: MOVED[name]})


@pytest.mark.parametrize("precision", [p for p in FP8 if p != "fp8_delayed"])
@pytest.mark.parametrize("name", ["fp8_amax_history", "fp8_amax"])
def test_amax_is_of_delayed_scaling(name: str, precision: str) -> None:
    refused(precision, rf"{name}=.* is of policy.precision=fp8_delayed; {precision} ", **{name: MOVED[name]})
    check_policy(policy("fp8_delayed", **{name: MOVED[name]}))


@pytest.mark.parametrize("end", ["start", "end"])
def test_delayed_scaling_has_no_layers_in_bf16(end: str) -> None:
    refused("fp8_delayed", "do not go with policy.precision=fp8_delayed", **{f"fp8_bf16_layers_at_{end}": 1})
    check_policy(policy("fp8_tensorwise", **{f"fp8_bf16_layers_at_{end}": 1}))


def test_a_limit_needs_a_comparison() -> None:
    refused(
        "mxfp8",
        r"fp8_flip_limit=0.1 is looked at by .* off. Set policy.options.fp8_check_every",
        fp8_flip_limit=0.1,
    )
    check_policy(policy("mxfp8", fp8_flip_limit=0.1, fp8_check_every=1))


@pytest.mark.parametrize(
    ("precision", "settings", "match"),
    [
        (
            "fp8_tensorwise",
            {"distributed_optimizer": False},
            "fp8_params=true needs policy.distributed_optimizer=true",
        ),
        (
            "fp8_blockwise",
            {"optimizer_on_host": 0.5},
            "optimizer_on_host=0.5 needs policy.precision=fp8_delayed",
        ),
        ("mxfp8", {"overlap": True}, "policy.options.overlap=true would use at the same time"),
    ],
)
def test_weights_in_fp8_exclude(precision: str, settings: dict[str, Any], match: str) -> None:
    refused(precision, match, fp8_params=True, **settings)
    check_policy(policy(precision, **settings))  # it is fp8_params that does not go with them


@pytest.mark.parametrize("precision", FP8)
def test_each_recipe_goes_with_its_own_options(precision: str) -> None:
    check_policy(policy(precision, fp8_params=True, fp8_check_every=4, fp8_flip_limit=0.05))


GPUS = {  # newest software: which recipes run
    A100: (),
    RTX4090: ("fp8_delayed", "fp8_tensorwise"),
    H100: ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise"),
    B200: FP8,
    RTX5090: ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise"),
}


@pytest.mark.parametrize("precision", FP8)
@pytest.mark.parametrize("capability", GPUS)
def test_which_gpu_computes_what(capability: tuple[int, int], precision: str) -> None:
    """As the check_*_support functions of transformer_engine/pytorch/quantization.py say."""
    if precision in GPUS[capability]:
        check_gpu(precision, capability=capability)
        return
    with pytest.raises(ConfigError, match=rf"policy.precision={precision} .*(Use|not)"):
        check_gpu(precision, capability=capability)


@pytest.mark.parametrize(
    ("precision", "capability", "te_version", "cuda_version", "match"),
    [
        ("mxfp8", None, "2.14", "13.0", "needs a GPU, and there is none. Use bf16 or fp32"),
        (
            "fp8_tensorwise",
            H100,
            None,
            "13.0",
            "needs Transformer Engine, which is not installed. Install the extra gpu",
        ),
        ("fp8_tensorwise", H100, "2.1.0", "12.9", "needs Transformer Engine 2.2 or newer, not 2.1.0"),
        ("fp8_delayed", H100, "1.13", "12.9", "needs Transformer Engine 2.1 or newer, not 1.13"),
        ("fp8_blockwise", H100, "2.2.0.dev0+abc", "12.9", "needs Transformer Engine 2.3 or newer"),
        ("fp8_blockwise", H100, "2.14", "12.8", "needs CUDA 12.9 or newer, not 12.8. Use fp8_tensorwise"),
        ("fp8_blockwise", H100, "2.14", None, "needs CUDA 12.9 or newer, not None"),
        (
            "fp8_blockwise",
            B200,
            "2.8",
            "12.9",
            "needs Transformer Engine 2.9 on a GPU after Hopper, not 2.8. Use mxfp8",
        ),
        (
            "fp8_blockwise",
            A100,
            "2.14",
            "12.9",
            r"compute capability 8.9 or higher .* this one has 8.0. Use bf16",
        ),
        ("mxfp8", H100, "2.14", "12.9", r"10.0 \(B200\), and this one has 9.0. Use fp8_blockwise"),
        ("mxfp8", RTX5090, "2.14", "12.9", "is not supported at compute capability 12.0. Use fp8_tensorwise"),
    ],
)
def test_what_is_missing_is_named(
    precision: str,
    capability: tuple[int, int] | None,
    te_version: str | None,
    cuda_version: str | None,
    match: str,
) -> None:
    with pytest.raises(ConfigError, match=match):
        check_gpu(precision, capability=capability, te_version=te_version, cuda_version=cuda_version)


def test_what_is_just_enough() -> None:
    check_gpu("fp8_blockwise", capability=H100, te_version="2.3.0.dev0", cuda_version="12.9")
    check_gpu("fp8_blockwise", capability=B200, te_version="2.9.0", cuda_version="13.0")
    for precision in ("bf16", "fp32"):  # rules of FP8 alone
        check_gpu(precision, capability=None, te_version=None, cuda_version=None)


def test_versions() -> None:
    assert version_of("2.3.0.dev0+cu129") == (2, 3, 0) > (2, 3)
    assert version_of("12.9") < version_of("12.10")


@pytest.mark.parametrize(
    ("precision", "settings", "wanted"),
    [
        ("bf16", {"tensor_parallel": 4}, 1),
        ("fp32", {"tensor_parallel": 4, "sequence_parallel": True}, 4),
        ("fp8_delayed", {}, 16),
        ("fp8_tensorwise", {"tensor_parallel": 4}, 16),
        ("fp8_tensorwise", {"tensor_parallel": 4, "sequence_parallel": True}, 64),
        ("fp8_blockwise", {"tensor_parallel": 2, "sequence_parallel": True}, 256),
        ("mxfp8", {"tensor_parallel": 2, "sequence_parallel": True}, 64),
        ("mxfp8", {"tensor_parallel": 2, "sequence_parallel": True, "tp_overlap": True}, 256),
    ],
)
def test_tokens_of_a_micro_batch(precision: str, settings: dict[str, Any], wanted: int) -> None:
    assert token_multiple(policy(precision, **settings)) == wanted


@pytest.mark.parametrize("precision", FP8)
def test_tokens_are_what_megatron_core_aligns_to(precision: str) -> None:
    utils = pytest.importorskip("megatron.core.fp8_utils")
    enums = pytest.importorskip("megatron.core.enums")
    least = utils.get_fp8_align_size(enums.Fp8Recipe(RECIPES[precision].name))
    assert RECIPES[precision].tokens % least == 0 and RECIPES[precision].features == least


@pytest.mark.parametrize("precision", FP8)
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_qwen7b_fits_every_recipe(precision: str, tensor_parallel: int) -> None:
    check_fp8_sizes(SimpleNamespace(**QWEN7B), policy(precision, tensor_parallel=tensor_parallel))


@pytest.mark.parametrize(
    ("precision", "settings", "sizes", "match"),
    [
        ("fp8_blockwise", {}, {"hidden_size": 3592}, "widths that 16 divides, and hidden_size is 3592"),
        (
            "mxfp8",
            {},
            {"hidden_size": 3600, "head_dim": 128},
            "widths that 32 divides, and hidden_size is 3600",
        ),
        (
            "fp8_tensorwise",
            {"tensor_parallel": 4},
            {"intermediate_size": 18976},
            "intermediate_size is 4744 at policy.tensor_parallel=4. Use a smaller tensor_parallel, or bf16",
        ),
        (
            "fp8_delayed",
            {"tensor_parallel": 4},
            {"head_dim": 24, "num_attention_heads": 28},
            r"\(num_attention_heads \+ 2 num_key_value_heads\) head_dim is 216",
        ),
        ("mxfp8", {}, {"moe_intermediate_size": 720}, "moe_intermediate_size is 720"),
        (
            "mxfp8",
            {"pipeline_parallel": 4, "fp8_bf16_layers_at_end": 8},
            {},
            "fp8_bf16_layers_at_end=8 must not exceed the 7 layers of a pipeline stage",
        ),
        (
            "fp8_blockwise",
            {"fp8_bf16_layers_at_start": 14, "fp8_bf16_layers_at_end": 14},
            {},
            "leave none of 28 layers to policy.precision=fp8_blockwise",
        ),
    ],
)
def test_sizes_that_do_not_fit(
    precision: str, settings: dict[str, Any], sizes: dict[str, Any], match: str
) -> None:
    hf_config = SimpleNamespace(**QWEN7B | sizes)
    with pytest.raises(ConfigError, match=match):
        check_fp8_sizes(hf_config, policy(precision, **settings))
    check_fp8_sizes(hf_config, policy("bf16", tensor_parallel=4))  # a rule of FP8 alone


@pytest.mark.parametrize(
    ("policy_precision", "capability", "match"),
    [
        ("bf16", None, "rollout.precision=fp8 needs a GPU of compute capability 8.9 .* there is none"),
        ("fp8_blockwise", A100, "this one has 8.0. Set rollout.precision=policy"),
        ("fp32", H100, "vLLM quantizes bf16 weights"),
    ],
)
def test_rollouts_in_fp8_are_refused(
    policy_precision: str, capability: tuple[int, int] | None, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        check_rollout_gpu("fp8", policy_precision, capability=capability)
    check_rollout_gpu("policy", policy_precision, capability=capability)
    check_rollout_gpu("fp8", "bf16", capability=H100)


def test_the_native_engine_does_not_quantize() -> None:
    with pytest.raises(ConfigError, match=r"rollout.precision=fp8 is vLLM's, and rollout.engine=native"):
        check_servers(RolloutConfig(precision="fp8", engine="native"), PolicyConfig())
    check_servers(RolloutConfig(precision="fp8", engine="vllm"), PolicyConfig())
