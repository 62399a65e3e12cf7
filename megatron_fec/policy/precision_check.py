"""The FP8 monitor: one micro-batch of a step, forward in FP8 and in bf16 under the same weights.

Three passes of one micro-batch: bf16 before the step's updates, for old log-probs in bf16, then FP8 and bf16 after them,
when the ratios have moved. Nothing that trains depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import Tensor

from megatron_fec.algorithm.precision_error import precision_error
from megatron_fec.algorithm.thresholds import ThresholdLines
from megatron_fec.metrics import MetricSums
from megatron_fec.policy.step import Policy, reduce_metrics, token_statistics
from megatron_fec.types import BlendWeights, MicroBatch, TokenStats

Precision = Callable[[Policy], AbstractContextManager[None]]
METRICS = "fp8/"  # in front of every name


@contextmanager
def in_bf16(policy: Policy) -> Iterator[None]:
    """Inside the block no layer enters megatron-core's FP8 context.

    Both lines ask config.fp8 in each forward pass of the transformer block, and every module holds the same config.
    Weights that are kept in FP8 are then dequantized by Transformer Engine: what is compared are the activations.
    """
    config = policy.bridge.config
    own = config.fp8
    config.fp8 = None
    try:
        yield
    finally:
        config.fp8 = own


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionCheck:
    """The micro-batch of a step, and its log-probs before the updates; every rank of a pipeline holds one."""

    policy: Policy
    micro_batch: MicroBatch  # with old_logprobs of the training precision
    old_logprobs: Tensor | None  # in bf16; None off the last stage
    exactly: Precision

    def finish(self, weights: BlendWeights, *, lines: ThresholdLines) -> dict[str, float]:
        """The means over all ranks' micro-batches under the weights of now, the same on every rank."""
        low = _statistics(self.policy, self.micro_batch)
        with self.exactly(self.policy):
            exact = _statistics(self.policy, self.micro_batch)
        sums: list[MetricSums] = []
        if low is not None and exact is not None:
            assert self.old_logprobs is not None
            pairs = precision_error(
                low[1],
                exact[1],
                low[0],
                exact_old_logprobs=self.old_logprobs,
                weights=weights,
                lines=lines,
            )
            sums.append(MetricSums.of(pairs))
        means = reduce_metrics(sums, self.policy.layout).means()
        return {METRICS + name: value for name, value in means.items()}


def start_check(
    policy: Policy, updates: Sequence[Sequence[MicroBatch]], *, draw: int, exactly: Precision = in_bf16
) -> PrecisionCheck:
    """Before the updates of a step; `draw`, any integer that all ranks share, chooses the micro-batch.

    It is the same place on every data-parallel rank: in one update all have equally many micro-batches of one length.
    """
    update = updates[draw % len(updates)]
    micro_batch = update[draw // len(updates) % len(update)]
    with exactly(policy):
        before = _statistics(policy, micro_batch)
    return PrecisionCheck(
        policy=policy,
        micro_batch=micro_batch,
        old_logprobs=None if before is None else before[1].logprobs,
        exactly=exactly,
    )


def _statistics(policy: Policy, micro_batch: MicroBatch) -> tuple[MicroBatch, TokenStats] | None:
    """The micro-batch on its device and its statistics; None off the last stage."""
    ((placed, stats),) = token_statistics(policy, [micro_batch], second_moments=False)
    return None if stats is None else (placed, stats)
