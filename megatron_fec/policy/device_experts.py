"""The part of the CPU adapter (device.py) that a mixture of experts needs: each expert gets another number of tokens.

NCCL gathers and scatters parts of unequal size as one broadcast or reduction a rank; gloo refuses them, so they are
written out here as the same broadcasts and reductions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def redirect_experts() -> None:
    """Call once, before a mixture of experts is built."""
    from megatron.core.transformer.moe import moe_utils

    # The router asks whether this is None; megatron-core 0.16 defines it only where Transformer Engine is installed.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
    dist.all_to_all_single = _with_listed_splits(dist.all_to_all_single)
    dist.all_gather = _of_unequal_parts(dist.all_gather, _gather_unequal)
    dist.reduce_scatter = _of_unequal_parts(dist.reduce_scatter, _scatter_unequal)


def _with_listed_splits(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    """The token counts leave a GPU as numpy arrays, which torch takes; on the CPU they stay tensors."""

    @functools.wraps(all_to_all)
    def exchange(*args: Any, **kwargs: Any) -> Any:
        listed = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in kwargs.items()}
        return all_to_all(*args, **listed)

    return exchange


def _of_unequal_parts(plain: Callable[..., Any], unequal: Callable[..., None]) -> Callable[..., Any]:
    """The collective, by `unequal` where the parts of the list among its first two arguments differ in size."""

    @functools.wraps(plain)
    def collective(first: Any, second: Any, *args: Any, **kwargs: Any) -> Any:
        parts = first if isinstance(first, (list, tuple)) else second
        if len({part.shape for part in parts}) == 1:
            return plain(first, second, *args, **kwargs)
        assert not args and kwargs.keys() == {"group"}, "as megatron-core calls it"
        return unequal(first, second, **kwargs)

    return collective


def _gather_unequal(parts: Sequence[Tensor], own: Tensor, *, group: dist.ProcessGroup) -> None:
    with torch.no_grad():
        parts[dist.get_rank(group)].copy_(own)
        for rank, part in enumerate(parts):
            # The parts are views of one tensor, of which gloo takes whole ones only.
            whole = part.contiguous()
            dist.broadcast(whole, group=group, group_src=rank)
            part.copy_(whole)


def _scatter_unequal(own: Tensor, parts: Sequence[Tensor], *, group: dist.ProcessGroup) -> None:
    with torch.no_grad():
        for rank, part in enumerate(parts):
            total = part.clone(memory_format=torch.contiguous_format)
            dist.reduce(total, group=group, group_dst=rank)
            if rank == dist.get_rank(group):
                own.copy_(total)
