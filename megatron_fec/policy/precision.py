"""policy.precision and the FP8 options in megatron-core's words: pure mappings to its three configurations.

What stays in bf16 and fp32 in every recipe: the embedding, the norms, attention between its projections, the output
layer, the token statistics, the loss, gradients (summed in fp32), master weights and moments. megatron-core enters the
FP8 context around its transformer layers alone.
"""

from __future__ import annotations

from typing import Any

from megatron.core.enums import Fp8Recipe

from megatron_fec.config import PolicyConfig
from megatron_fec.policy_options import options_of_policy
from megatron_fec.precision_rules import RECIPES


def transformer_precision(policy: PolicyConfig) -> dict[str, Any]:
    """Fields of TransformerConfig; none where the precision is not FP8, whose dtype is the bridge's.

    Not among them: fp8_output_proj of 0.19, which would take the output layer into MXFP8, and
    fp8_dot_product_attention, which has no packed sequences.
    """
    recipe = RECIPES.get(policy.precision)
    if recipe is None:
        return {}
    options = options_of_policy(policy)
    start, end = options.fp8_bf16_layers_at_start, options.fp8_bf16_layers_at_end
    settings: dict[str, Any] = {
        "fp8": recipe.number_format,
        "fp8_recipe": Fp8Recipe(recipe.name),
        "fp8_param": options.fp8_params,
        "fp8_wgrad": True,
        "first_last_layers_bf16": start + end > 0,
    }
    if start + end:
        settings |= {"num_layers_at_start_in_bf16": start, "num_layers_at_end_in_bf16": end}
    if recipe.name == "delayed":
        # The largest value is reduced over DP x TP x CP, as megatron-core does by default: replicas scale alike.
        settings |= {
            "fp8_margin": 0,
            "fp8_amax_history_len": options.fp8_amax_history,
            "fp8_amax_compute_algo": options.fp8_amax,
            "tp_only_amax_red": False,
        }
    return settings


def ddp_precision(policy: PolicyConfig) -> dict[str, Any]:
    """Fields of DistributedDataParallelConfig: weights in FP8 are gathered as such."""
    if not options_of_policy(policy).fp8_params:
        return {}
    return {"fp8_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": policy.precision == "mxfp8"}


def optimizer_precision(policy: PolicyConfig) -> dict[str, Any]:
    """Fields of OptimizerConfig; the distributed optimizer treats FP8 weights by their recipe."""
    recipe = RECIPES.get(policy.precision)
    if recipe is None or not options_of_policy(policy).fp8_params:
        return {}
    return {"fp8_recipe": recipe.name, "reuse_grad_buf_for_mxfp8_param_ag": recipe.name == "mxfp8"}
