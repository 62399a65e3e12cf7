"""The sizes of a checkpoint in the planner's words, and products a token meets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_fec.policy.experts import num_experts
from megatron_fec.policy.sizes import parameter_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Widths of the whole model, before any split."""

    layers: int
    hidden: int
    heads: int
    head: int  # width of one
    queries: int  # heads x head
    keys: int  # width of all keys, and of all values
    key_heads: int
    feed_forward: int  # of a dense layer, or of one expert
    experts: int  # of a layer; 0 in a dense model
    experts_per_token: int
    vocabulary: int
    has_qk_norm: bool
    parameters: int

    @property
    def attention_weights(self) -> int:
        """Elements of a layer's projections."""
        return self.hidden * (2 * self.queries + 2 * self.keys)

    @property
    def feed_forward_weights(self) -> int:
        """Elements that one token meets in a layer: of the chosen experts, and of their router."""
        return (
            3 * self.hidden * self.feed_forward * max(1, self.experts_per_token) + self.hidden * self.experts
        )

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def tensors(self) -> int:
        """Of the checkpoint, about: what a refit sends."""
        return self.layers * (9 + 3 * self.experts) + 3

    def cache_bytes(self, element: int, *, ranks: int) -> float:
        """Of one token, on each of an engine's ranks: more ranks than heads of keys hold copies."""
        return 2 * self.layers * self.keys * element / min(ranks, self.key_heads)


def shape_of(hf_config: Any) -> Shape:
    """Of a Hugging Face configuration that policy/sizes.py counts."""
    experts = num_experts(hf_config)
    head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return Shape(
        layers=hf_config.num_hidden_layers,
        hidden=hf_config.hidden_size,
        heads=hf_config.num_attention_heads,
        head=head,
        queries=hf_config.num_attention_heads * head,
        keys=hf_config.num_key_value_heads * head,
        key_heads=hf_config.num_key_value_heads,
        feed_forward=hf_config.moe_intermediate_size if experts else hf_config.intermediate_size,
        experts=experts,
        experts_per_token=hf_config.num_experts_per_tok if experts else 0,
        vocabulary=hf_config.vocab_size,
        has_qk_norm=hf_config.model_type in ("qwen3", "qwen3_moe"),
        parameters=parameter_count(hf_config),
    )
