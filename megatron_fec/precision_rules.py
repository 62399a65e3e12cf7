"""What an FP8 recipe needs of options, sizes, GPU and Transformer Engine: pure rules, usable for a GPU that is not here.

Sources: transformer_engine/pytorch/quantization.py and utils.py of 2.1 to 2.20, megatron/core/fp8_utils.py and
transformer_config.py of 0.16 and 0.19, megatron/training/arguments.py. docs/fp8.md says what each recipe does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_fec.errors import ConfigError
from megatron_fec.policy_options import FP8, PolicyOptions, options_of_policy

if TYPE_CHECKING:
    from megatron_fec.config import PolicyConfig

Version = tuple[int, ...]
ADA, HOPPER, BLACKWELL, BLACKWELL_CONSUMER = (8, 9), (9, 0), (10, 0), (12, 0)
BLOCKWISE_ON_BLACKWELL = (2, 9)  # Transformer Engine runs it there as MXFP8
BLOCKWISE_CUDA = (12, 9)
PLANNED_TE, PLANNED_CUDA = "2.9", "12.9"  # with which every recipe runs where the GPU can
USERBUFFER_MULTIPLE = 128  # of a tensor rank's MXFP8 rows, where collectives overlap with products
# Options that act on FP8 alone.
FP8_OPTIONS = (
    "fp8_params",
    "fp8_bf16_layers_at_start",
    "fp8_bf16_layers_at_end",
    "fp8_amax_history",
    "fp8_amax",
    "fp8_check_every",
    "fp8_flip_limit",
)
DELAYED_OPTIONS = ("fp8_amax_history", "fp8_amax")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One of FP8 in megatron-core's words, and what it divides by."""

    name: str  # megatron-core's fp8_recipe
    number_format: str  # megatron-core's fp8: hybrid is e4m3 forward and e5m2 backward
    features: int  # every width of a product is a multiple of it, on each tensor rank
    tokens: int  # and so is the number of tokens that a rank multiplies
    transformer_engine: Version  # the oldest that megatron-core takes for it


RECIPES = {
    "fp8_delayed": Recipe(
        name="delayed", number_format="hybrid", features=16, tokens=16, transformer_engine=(2, 1)
    ),
    "fp8_tensorwise": Recipe(
        name="tensorwise", number_format="hybrid", features=16, tokens=16, transformer_engine=(2, 2)
    ),
    # With fewer than 128 tokens a shard Transformer Engine gathers sequence-parallel activations in bf16.
    "fp8_blockwise": Recipe(
        name="blockwise", number_format="e4m3", features=16, tokens=128, transformer_engine=(2, 3)
    ),
    "mxfp8": Recipe(name="mxfp8", number_format="e4m3", features=32, tokens=32, transformer_engine=(2, 1)),
}
assert tuple(RECIPES) == FP8


def version_of(text: str) -> Version:
    """The leading numbers of a version: 2.3.0.dev0+cu129 is (2, 3, 0)."""
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def token_multiple(policy: PolicyConfig) -> int:
    """What the tokens of a micro-batch on a context rank are a multiple of: rollout/packing.py's `multiple`.

    Under sequence parallelism each tensor rank quantizes its own share of them.
    """
    shards = policy.tensor_parallel if policy.sequence_parallel else 1
    recipe = RECIPES.get(policy.precision)
    if recipe is None:
        return shards
    overlaps = recipe.name == "mxfp8" and options_of_policy(policy).tp_overlap
    return shards * (USERBUFFER_MULTIPLE if overlaps else recipe.tokens)


def check_precision(policy: PolicyConfig) -> None:
    """Raises ConfigError for an option that this precision does not read, and for what excludes each other."""
    recipe, chosen = RECIPES.get(policy.precision), options_of_policy(policy)
    moved = [name for name in FP8_OPTIONS if getattr(chosen, name) != getattr(PolicyOptions(), name)]
    if recipe is None:
        if moved:
            raise ConfigError(
                f"policy.options.{moved[0]}={getattr(chosen, moved[0])} does nothing at policy.precision="
                f"{policy.precision}. Leave it out, or choose one of {', '.join(FP8)}."
            )
        return
    for name in DELAYED_OPTIONS:
        if name in moved and recipe.name != "delayed":
            raise ConfigError(
                f"policy.options.{name}={getattr(chosen, name)} is of policy.precision=fp8_delayed; {policy.precision} "
                "scales by what it sees. Leave it out."
            )
    if recipe.name == "delayed" and (chosen.fp8_bf16_layers_at_start or chosen.fp8_bf16_layers_at_end):
        raise ConfigError(
            "policy.options.fp8_bf16_layers_at_start and _at_end do not go with policy.precision=fp8_delayed: its scales "
            "are reduced once for all layers. Set them to 0, or use fp8_tensorwise."
        )
    if chosen.fp8_flip_limit < 1 and not chosen.fp8_check_every:
        raise ConfigError(
            f"policy.options.fp8_flip_limit={chosen.fp8_flip_limit} is looked at by the comparison with bf16, which is "
            "off. Set policy.options.fp8_check_every, such as to 10."
        )
    if chosen.fp8_params:
        _check_params(policy, chosen, recipe)


def _check_params(policy: PolicyConfig, chosen: PolicyOptions, recipe: Recipe) -> None:
    if not policy.distributed_optimizer:
        raise ConfigError(
            "policy.options.fp8_params=true needs policy.distributed_optimizer=true, which keeps the fp32 weights and "
            "quantizes them. Set that, or leave fp8_params out."
        )
    if chosen.optimizer_on_host and recipe.name != "delayed":
        raise ConfigError(
            f"policy.options.fp8_params=true with policy.options.optimizer_on_host={chosen.optimizer_on_host} needs "
            f"policy.precision=fp8_delayed, not {policy.precision} (megatron-core). Leave one of them out."
        )
    if chosen.overlap and recipe.name == "mxfp8":
        raise ConfigError(
            "policy.options.fp8_params=true at policy.precision=mxfp8 gathers weights in the gradient buffer, which "
            "policy.options.overlap=true would use at the same time. Leave one of them out."
        )


def check_gpu(
    precision: str,
    *,
    capability: Version | None,
    te_version: str | None = PLANNED_TE,
    cuda_version: str | None = PLANNED_CUDA,
) -> None:
    """Raises ConfigError where this GPU, or this Transformer Engine on it, cannot compute the precision.

    capability: (9, 0) for H100 and H200, (10, 0) for B200; None without a GPU. te_version, cuda_version: None where
    none is installed; the defaults ask about the GPU alone.
    """
    recipe = RECIPES.get(precision)
    if recipe is None:
        return
    setting = f"policy.precision={precision}"
    if capability is None:
        raise ConfigError(f"{setting} needs a GPU, and there is none. Use bf16 or fp32, or start it on one.")
    if te_version is None:
        raise ConfigError(
            f"{setting} needs Transformer Engine, which is not installed. Install the extra gpu, or use bf16."
        )
    if version_of(te_version) < recipe.transformer_engine:
        raise ConfigError(
            f"{setting} needs Transformer Engine {_text(recipe.transformer_engine)} or newer, not {te_version}. "
            "Install one, or use bf16."
        )
    if fault := _fault_of_gpu(recipe, capability, te_version, cuda_version):
        raise ConfigError(f"{setting} {fault}")


def check_rollout_gpu(rollout_precision: str, policy_precision: str, *, capability: Version | None) -> None:
    """Raises ConfigError where vLLM cannot multiply in FP8; it would else compute with bf16 copies of FP8 weights."""
    if rollout_precision != "fp8":
        return
    if policy_precision == "fp32":
        raise ConfigError(
            "rollout.precision=fp8 with policy.precision=fp32: vLLM quantizes bf16 weights. Set rollout.precision=policy."
        )
    if capability is None or capability < ADA:
        here = "there is none" if capability is None else f"this one has {_text(capability)}"
        raise ConfigError(
            f"rollout.precision=fp8 needs a GPU of compute capability {_text(ADA)} or higher (H100 has 9.0), and {here}. "
            "Set rollout.precision=policy."
        )


def _fault_of_gpu(recipe: Recipe, capability: Version, te_version: str, cuda_version: str | None) -> str:
    """What is missing and the remedy, or ""."""
    here = f"this one has {_text(capability)}"
    if capability < ADA:
        return (
            f"needs a GPU of compute capability {_text(ADA)} or higher (H100 has 9.0), and {here}. Use bf16."
        )
    if recipe.name == "blockwise":
        if capability < HOPPER:
            return f"needs a GPU of compute capability 9.0 (H100), and {here}. Use fp8_tensorwise."
        if capability >= BLACKWELL and version_of(te_version) < BLOCKWISE_ON_BLACKWELL:
            return f"needs Transformer Engine 2.9 on a GPU after Hopper, not {te_version}. Use mxfp8."
        if cuda_version is None or version_of(cuda_version) < BLOCKWISE_CUDA:
            return f"needs CUDA 12.9 or newer, not {cuda_version}. Use fp8_tensorwise."
    if recipe.name == "mxfp8":
        if capability < BLACKWELL:
            return f"needs a GPU of compute capability 10.0 (B200), and {here}. Use fp8_blockwise."
        if capability >= BLACKWELL_CONSUMER:
            return f"is not supported at compute capability {_text(capability)}. Use fp8_tensorwise."
    return ""


def check_fp8_sizes(hf_config: Any, policy: PolicyConfig) -> None:
    """The checkpoint's widths, on each tensor rank, and its layers in bf16; needs only config.json."""
    recipe = RECIPES.get(policy.precision)
    if recipe is None:
        return
    tp = policy.tensor_parallel
    for name, width in fp8_widths(hf_config, policy).items():
        if width % recipe.features:
            raise ConfigError(
                f"policy.precision={policy.precision} needs widths that {recipe.features} divides, and {name} is {width} "
                f"at policy.tensor_parallel={tp}. Use a smaller tensor_parallel, or bf16."
            )
    chosen, layers = options_of_policy(policy), hf_config.num_hidden_layers
    start, end = chosen.fp8_bf16_layers_at_start, chosen.fp8_bf16_layers_at_end
    most = layers // policy.pipeline_parallel
    for name, count in (("start", start), ("end", end)):
        if count > most:
            raise ConfigError(
                f"policy.options.fp8_bf16_layers_at_{name}={count} must not exceed the {most} layers of a pipeline stage "
                f"({layers} layers, policy.pipeline_parallel={policy.pipeline_parallel}). Lower it."
            )
    if start + end >= layers:
        raise ConfigError(
            f"policy.options.fp8_bf16_layers_at_start={start} and _at_end={end} leave none of {layers} layers to "
            f"policy.precision={policy.precision}. Lower them, or use bf16."
        )


def fp8_widths(hf_config: Any, policy: PolicyConfig) -> dict[str, int]:
    """By name, the widths of the products of a layer on one tensor rank."""
    tp, hidden, heads = policy.tensor_parallel, hf_config.hidden_size, hf_config.num_attention_heads
    head = getattr(hf_config, "head_dim", None) or hidden // heads
    widths = {
        "hidden_size": hidden,
        "(num_attention_heads + 2 num_key_value_heads) head_dim": (heads + 2 * hf_config.num_key_value_heads)
        * head
        // tp,
        "num_attention_heads head_dim": heads * head // tp,
    }
    if expert := getattr(hf_config, "moe_intermediate_size", None):
        widths["moe_intermediate_size"] = expert // options_of_policy(policy).expert_tensor_parallel
    else:
        widths["intermediate_size"] = hf_config.intermediate_size // tp
    return widths


def _text(version: Version) -> str:
    return ".".join(str(number) for number in version)
