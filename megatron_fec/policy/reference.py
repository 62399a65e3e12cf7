"""Log-probs of a frozen reference policy: the weights that the run started from, kept in host memory.

They take the place of the policy's for a forward pass, as in NeMo-Aligner: a second model on the GPU would cost its
memory all the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from megatron_fec.policy.step import Policy, cores, gather_weights, token_statistics
from megatron_fec.types import MicroBatch


class ReferencePolicy:
    """This rank's shard of the weights at the time of construction."""

    def __init__(self, policy: Policy) -> None:
        self._weights = _on_host(policy)

    def fill(self, policy: Policy, updates: Sequence[Sequence[MicroBatch]]) -> list[list[MicroBatch]]:
        """The micro-batches with reference_logprobs; off the last stage they come back unchanged.

        The reference routes tokens to experts of its own choice, whatever the policy's routing is.
        """
        unrouted = [[replace(mb, routing=None) for mb in update] for update in updates]
        with self._in_place_of(policy):
            passes = [token_statistics(policy, update, second_moments=False) for update in unrouted]
        return [
            [
                mb if stats is None else replace(mb, reference_logprobs=stats.logprobs)
                for mb, (_, stats) in zip(update, pairs, strict=True)
            ]
            for update, pairs in zip(updates, passes, strict=True)
        ]

    @contextmanager
    def _in_place_of(self, policy: Policy) -> Iterator[None]:
        own = _on_host(policy)
        _copy_in(policy, self._weights)
        try:
            yield
        finally:
            _copy_in(policy, own)


def _on_host(policy: Policy) -> list[Tensor]:
    gather_weights(policy)
    return [parameter.detach().to("cpu", copy=True) for parameter in _parameters(policy)]


@torch.no_grad()
def _copy_in(policy: Policy, weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(_parameters(policy), weights, strict=True):
        parameter.copy_(weight)


def _parameters(policy: Policy) -> list[torch.nn.Parameter]:
    return [parameter for core in cores(policy) for parameter in core.parameters()]
