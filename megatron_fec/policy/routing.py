"""Router replay: an update sends each token to the experts that the log-prob pass has chosen for it.

Only the choice is kept; the gates of the chosen experts are those of the current weights, and learn. The choice travels
with its micro-batch, so that any order and number of updates finds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_fec.types import MicroBatch


class RoutingTape:
    """What one router chose for each micro-batch of a pass, in their order; a TopKRouter asks it for its experts.

    It stands where megatron-core's RouterReplay would, which lists its instances process-wide for ever, and whose switch
    between a forward and its recomputation holds for all micro-batches, while a pipeline has several under way.
    """

    def __init__(self) -> None:
        self.start(chosen=[], record=False)

    def start(self, *, chosen: list[Tensor], record: bool) -> None:
        """Of a pass; chosen: the experts of each micro-batch, to be used again, or nothing."""
        self.chosen, self.is_recording = chosen, record
        self.recorded: list[Tensor] = []
        self.forwards = self.graphs = 0  # calls that started a micro-batch; calls that built its graph

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(scores, experts) of each token, [T, topk]; scores: [T, experts]."""
        if self.chosen:
            experts = self.chosen[self._micro_batch()].to(scores.device, torch.int64)
            assert experts.shape == (scores.shape[0], topk), "the packing is that of the log-prob pass"
            return scores.gather(1, experts), experts
        assert default_compute_topk is not None
        values, experts = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.is_recording:
            self.recorded.append(experts.to(index_type(scores.shape[1])))
        return values, experts

    def _micro_batch(self) -> int:
        """Which one this call is of: each is first seen in order, and so is each that is recomputed for its backward.

        A checkpointed forward builds no graph; whenever more have been seen than have a graph, a call that builds one
        recomputes.
        """
        if torch.is_grad_enabled() and self.graphs < self.forwards:
            self.graphs += 1
            return self.graphs - 1
        self.forwards += 1
        self.graphs += torch.is_grad_enabled()
        return self.forwards - 1


def index_type(num_experts: int) -> torch.dtype:
    """The smallest integers that number the experts."""
    return torch.uint8 if num_experts <= 256 else torch.int16


def attach_tapes(models: Sequence[torch.nn.Module]) -> list[RoutingTape]:
    """One for each router of this rank's model chunks, in the order of its layers."""
    routers = [module for model in models for module in model.modules() if isinstance(module, TopKRouter)]
    tapes = [RoutingTape() for _ in routers]
    for router, tape in zip(routers, tapes, strict=True):
        router.router_replay = tape  # type: ignore[assignment]
    return tapes


@contextmanager
def routing(
    tapes: Sequence[RoutingTape], micro_batches: Sequence[MicroBatch], *, record: bool = False
) -> Iterator[list[Tensor]]:
    """Inside, tokens go where MicroBatch.routing says, if it is filled.

    With record they go where the router likes, and afterwards the list holds MicroBatch.routing of each micro-batch:
    [layers, T, topk] of this rank's layers and tokens, small integers in host memory. Without tapes it stays empty.
    """
    kept: list[Tensor] = []
    filled = [] if record else [mb.routing for mb in micro_batches if mb.routing is not None]
    assert len(filled) in (0, len(micro_batches))
    for layer, tape in enumerate(tapes):
        tape.start(chosen=[experts[layer] for experts in filled], record=record)
    try:
        yield kept
        if record and tapes:
            layers = zip(*(tape.recorded for tape in tapes), strict=True)
            kept += [torch.stack(of_micro_batch).cpu() for of_micro_batch in layers]
    finally:
        for tape in tapes:
            tape.start(chosen=[], record=False)
