"""The two layers that megatron-core's local spec lacks: RMSNorm with sequence parallelism, attention over packed sequences.

They are used where Transformer Engine cannot run.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention

from megatron_fec.context_split import context_indices


class RMSNorm(torch.nn.Module):
    """Root mean square norm; computed in fp32, returned in the dtype of its input."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron all-reduces the gradients of the parameters that carry this mark over the TP group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class PackedAttention(torch.nn.Module):
    """Causal attention: inside each packed sequence, or over a KV cache.

    Packed: query [T, heads, dim], key and value [T, groups, dim] -> [T, heads * dim].
    Cached: query [S, batch, heads, dim], key and value [S_kv, batch, groups, dim] -> [S, batch, heads * dim].
    heads and groups are those of this TP rank, T the tokens of this context rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *unused: Any,
        pg_collection: ProcessGroupCollection,
        **also_unused: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *unused: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **also_unused: Any,
    ) -> Tensor:
        if packed_seq_params is None:
            return _cached_attention(query, key, value)
        if self.context_group.size() == 1:
            return _packed_attention(query, key, value, packed_seq_params)
        return _context_parallel_attention(
            query, key, value, packed_seq_params, context_group=self.context_group
        )


def _context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, *, context_group: ProcessGroup
) -> Tensor:
    """Every rank gathers the whole, attends for all tokens and keeps its own: simple, and as slow as one rank alone.

    The backward of the gather adds up what the ranks' own tokens ask of a row, on the rank that holds it.
    """
    size = context_group.size()
    order = torch.cat([context_indices(packed.cu_seqlens_q, rank=r, size=size) for r in range(size)])
    query, key, value = (
        gather_from_sequence_parallel_region(x, group=context_group)[order.argsort()]
        for x in (query, key, value)
    )
    return _packed_attention(query, key, value, packed)[order.chunk(size)[context_group.rank()]]


def _packed_attention(query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
    """Right-pads the N sequences to [N, heads, L, dim]: under the causal mask no real token sees the padding."""
    starts, length = packed.cu_seqlens_q[:-1].long(), packed.max_seqlen_q
    positions = torch.arange(length, device=query.device)
    rows = (starts[:, None] + positions).clamp_max(query.shape[0] - 1)  # [N, L]
    is_real = positions < packed.cu_seqlens_q.diff()[:, None]
    context = _attend(*(x[rows].transpose(1, 2) for x in (query, key, value)), is_causal=True)
    return context.transpose(1, 2)[is_real].flatten(1)


def _cached_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A query of one token sees the whole cache; a longer one is a prefill from position 0."""
    assert query.shape[0] in (1, key.shape[0])
    context = _attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), is_causal=query.shape[0] > 1)
    return context.permute(2, 0, 1, 3).flatten(2)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """[batch, heads, length, dim]; each key and value head serves heads / groups query heads."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal)
