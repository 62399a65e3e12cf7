"""What a lower precision of the forward pass changes: log-probs, entropy, and which tokens the bounds clip."""

from __future__ import annotations

from torch import Tensor

from megatron_fec.algorithm.aggregation import log_ratio
from megatron_fec.algorithm.surrogates import clip_masks
from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds
from megatron_fec.types import BlendWeights, LossInputs, MicroBatch, TokenStats

Pairs = dict[str, tuple[Tensor, Tensor]]  # of MetricSums: (sum, count)


def precision_error(
    low: TokenStats,
    exact: TokenStats,
    micro_batch: MicroBatch,
    *,
    exact_old_logprobs: Tensor,
    weights: BlendWeights,
    lines: ThresholdLines,
) -> Pairs:
    """(sum, count) over the response tokens of one micro-batch, all of low minus exact.

    low, exact: statistics of the same weights in two precisions. Each is compared with old log-probs of its own
    precision, micro_batch.old_logprobs and exact_old_logprobs, so that a ratio has the error of its own and not that of
    its denominator. flipped: tokens that the step's bounds clip in one precision and not in the other; clipped: in
    exact. The signed means are the bias, which does not average out over a batch; entropy in nats.
    """
    mask = micro_batch.response_mask
    assert micro_batch.old_logprobs is not None
    count = mask.sum()
    logprob, entropy = (low.logprobs - exact.logprobs)[mask], (low.entropy - exact.entropy)[mask]
    is_clipped = [
        _clipped(stats, old, micro_batch, weights, lines)[mask]
        for stats, old in ((low, micro_batch.old_logprobs), (exact, exact_old_logprobs))
    ]
    sums = {
        "logprob_error": logprob.double().abs().sum(),
        "logprob_bias": logprob.double().sum(),
        "entropy_error": entropy.double().abs().sum(),
        "entropy_bias": entropy.double().sum(),
        "flipped": (is_clipped[0] != is_clipped[1]).sum(),
        "clipped": is_clipped[1].sum(),
    }
    return {name: (total, count) for name, total in sums.items()}


def _clipped(
    stats: TokenStats,
    old_logprobs: Tensor,
    micro_batch: MicroBatch,
    weights: BlendWeights,
    lines: ThresholdLines,
) -> Tensor:
    """[T] bool: where the thresholds take the gradient, as the clipped surrogate does."""
    inputs = LossInputs(
        logprobs=stats.logprobs,
        old_logprobs=old_logprobs,
        advantages=micro_batch.advantages,
        response_mask=micro_batch.response_mask,
        bounds=clip_bounds(stats.logprobs.exp(), weights, lines=lines),
    )
    masks = clip_masks(log_ratio(inputs).exp(), inputs, dual_clip=None)
    return masks["clipped_upper"] | masks["clipped_lower"]
