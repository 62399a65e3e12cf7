"""Numbers that are not finite: every rank learns of them before an optimizer moves, and who had them first.

Megatron's own check (check_for_nan_in_grad) stays off: it raises on one rank, and the others would wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from megatron_fec.policy.device import device
from megatron_fec.policy.parallel import ParallelLayout

# What may be at fault, the cause before what follows from it.
WEIGHTS, LOGPROBS, LOSS, GRADIENTS, NORM = "weights", "log-probs", "loss", "gradients", "gradient norm"
KINDS = (WEIGHTS, LOGPROBS, LOSS, GRADIENTS, NORM)


class NonFiniteError(RuntimeError):
    """Raised on every rank with the same text, while weights and optimizer are as before the update."""


class GradientWatch:
    """Whether gradients are finite: this rank's own, seen before their reduction, which spreads a NaN to all ranks.

    is_reduced: they are reduced while the backward still runs (overlap), so they are seen when that has finished: the
    error may then name another rank of the data-parallel group than the one that had the NaN.
    """

    def __init__(self, *, is_reduced: bool = False) -> None:
        self.is_reduced = is_reduced
        self.is_finite = torch.tensor(True)  # of the last update; a scalar on the device

    def finalize(self, model: list[Any], *args: Any, **kwargs: Any) -> None:
        """Megatron's finalize_model_grads, with a look at the gradients before, or after."""
        if not self.is_reduced:
            self._look(model)
        finalize_model_grads(model, *args, **kwargs)
        if self.is_reduced:
            self._look(model)

    def _look(self, model: list[Any]) -> None:
        largest = [
            torch.linalg.vector_norm(buffer.grad_data, torch.inf)  # needs no second buffer, and keeps NaN
            for chunk in model
            for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ]
        self.is_finite = torch.stack(largest).isfinite().all()


def check_finite(
    chunks: Sequence[DistributedDataParallel],
    layout: ParallelLayout,
    is_finite: Mapping[str, Tensor | bool],
) -> None:
    """Raises NonFiniteError on every rank if any flag of any rank is False; one collective of one number.

    is_finite: by names of KINDS. The error names the tensor and the first rank that had it.
    """
    flags = torch.stack([torch.as_tensor(flag, device=device()) for flag in is_finite.values()])
    is_broken = (~flags.all()).int()
    dist.all_reduce(is_broken, op=dist.ReduceOp.MAX)
    if is_broken:
        broken = [kind for kind, flag in zip(is_finite, flags.tolist(), strict=True) if not flag]
        raise NonFiniteError(_first_cause(_own_cause(chunks, layout, broken)))


def _own_cause(
    chunks: Sequence[DistributedDataParallel], layout: ParallelLayout, broken: list[str]
) -> tuple[int, int, str] | None:
    """(index in KINDS, order, text) of this rank's first fault."""
    named = [(number, name, p) for number, chunk in enumerate(chunks) for name, p in chunk.named_parameters()]
    weights = [name for _, name, p in named if not p.isfinite().all()]
    if weights:
        return KINDS.index(WEIGHTS), 0, f"the weight {weights[0]}"
    if not broken:
        return None
    kind = min(broken, key=KINDS.index)
    if kind != GRADIENTS:
        return KINDS.index(kind), 0, f"the {kind}"
    # Backward meets the last chunk, the last stage and the last layer first.
    bad = [(number, name) for number, name, p in named if not p.main_grad.isfinite().all()]  # type: ignore[attr-defined]
    number, name = bad[-1] if bad else (0, "a weight")
    order = -(number * layout.pipeline_parallel + dist.get_rank(layout.pipeline_group))
    return KINDS.index(kind), order, f"the gradient of {name}"


def _first_cause(own: tuple[int, int, str] | None) -> str:
    everyone: list[tuple[int, int, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    _, _, rank, text = min(
        (cause[0], cause[1], rank, cause[2]) for rank, cause in enumerate(everyone) if cause is not None
    )
    return f"not finite: {text}, first on rank {rank}"
