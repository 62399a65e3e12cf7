"""The planner's activation bytes against what autograd saves in the real megatron-core model, on CPU with local layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from policy_fixtures import fp32
from ranks import run_on_ranks
from torch import Tensor
from transformers import Qwen2Config, Qwen3Config

from megatron_fec.config import PolicyConfig
from megatron_fec.planning.activations import kept_layer_bytes, last_stage_bytes
from megatron_fec.planning.shape import shape_of
from megatron_fec.policy.model import build_bridge, build_model, forward
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.sizes import stage_memory
from megatron_fec.rollout.packing import PackLayout, pack_demonstrations

TOKENS = 512
TOLERANCE = 0.02  # the issue asks for 0.10; small tensors are left out
WIDE = {"hidden_size": 96, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2}
DEEP = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}
LARGE_HEADS = WIDE | {"head_dim": 32}


def hf_config(sizes: dict[str, int], *, layers: int) -> Any:
    shared: dict[str, Any] = {"vocab_size": 512, "max_position_embeddings": 1024, "num_hidden_layers": layers}
    family: Any = Qwen3Config if "head_dim" in sizes else Qwen2Config
    return family(**shared, **sizes, tie_word_embeddings=False)


def saved_bytes(config: Any, settings: PolicyConfig) -> list[int]:
    """Of each rank: storages that the forward of one packed sequence leaves for the backward, parameters left out."""

    def job(rank: int) -> int:
        layout = initialize_parallel(settings, seed=1)
        bridge = build_bridge(config, settings)
        model = build_model(bridge, layout, temperature=1.0, vocab_size=config.vocab_size)
        packing = PackLayout(
            data_parallel_rank=0,
            data_parallel_size=1,
            micro_batch_tokens=TOKENS,
            multiple=settings.tensor_parallel if settings.sequence_parallel else 1,
        )
        [batch] = pack_demonstrations([(range(8), [1] * (TOKENS - 7))], layout=packing)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, Tensor] = {}  # by storage; the tensor keeps it alive, so that no address comes twice

        def keep(tensor: Tensor) -> Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in parameters:
                held.setdefault(address, tensor)
            return tensor

        model.train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(model, batch)
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    return run_on_ranks(settings.tensor_parallel, job)


def planned_bytes(config: Any, settings: PolicyConfig) -> float:
    shape = shape_of(config)
    layers = shape.layers * kept_layer_bytes(shape, settings, "local")
    per_token = layers + last_stage_bytes(shape, settings, "local")
    return TOKENS * per_token + stage_memory(config, settings, 0, world_size=settings.tensor_parallel).logits


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("sizes", "layers", "layout"),
    [
        (WIDE, 2, {}),
        (DEEP, 5, {}),
        (LARGE_HEADS, 3, {}),
        (WIDE, 3, {"tensor_parallel": 2}),
        (WIDE, 3, {"tensor_parallel": 2, "sequence_parallel": True}),
        (LARGE_HEADS, 2, {"tensor_parallel": 2, "sequence_parallel": True, "precision": "bf16"}),
        (WIDE, 3, {"precision": "bf16"}),
    ],
    ids=["wide", "deep", "qk_norm", "tp2", "tp2_sp", "qk_norm_tp2_sp_bf16", "bf16"],
)
def test_saved_activations_are_those_of_the_formula(
    sizes: dict[str, int], layers: int, layout: dict[str, Any], recompute: str
):
    settings = fp32(**{"micro_batch_tokens": TOKENS, "options": {"recompute": recompute}, **layout})
    config = hf_config(sizes, layers=layers)
    planned = planned_bytes(config, settings)
    assert saved_bytes(config, settings) == pytest.approx([planned] * settings.tensor_parallel, rel=TOLERANCE)
