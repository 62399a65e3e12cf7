"""The policy losses by the names of a configuration, what may be added to them, and what they choose over an update.

`algorithm.policy_loss=clip+entropy_bonus` is a key of POLICY_LOSSES and keys of ADDITIONS (algorithm/strategies.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_fec.algorithm.additions import (
    adaptive_entropy_bonus,
    entropy_bonus,
    kl,
    masked_importance,
    truncated_importance,
)
from megatron_fec.algorithm.aggregation import AGGREGATIONS, RATIO_MOVED, loss_output, policy_metrics
from megatron_fec.algorithm.selections import (
    archer,
    archer_marks,
    clip_cov,
    clip_cov_marks,
    high_entropy,
    high_entropy_marks,
    kl_cov,
    kl_cov_marks,
    steer,
    steer_marks,
)
from megatron_fec.algorithm.surrogates import (
    ce_gppo,
    cispo,
    clipped_surrogate,
    dcpo,
    gspo,
    region_study,
    reinforce,
    sapo,
)
from megatron_fec.metrics import MetricSums
from megatron_fec.types import Addition, LossOutput

__all__ = [
    "ADDITIONS",
    "AGGREGATIONS",
    "MARKS",
    "POLICY_LOSSES",
    "RATIO_MOVED",
    "READS_BOUNDS",
    "clipped_surrogate",
    "loss_output",
    "negative_log_likelihood",
    "policy_metrics",
]


def negative_log_likelihood(logprobs: Tensor, entropy: Tensor, response_mask: Tensor) -> LossOutput:
    """Supervised loss of the response tokens, all [T]; the count is their number."""
    count = response_mask.sum()
    metrics = MetricSums.of({"entropy": (torch.where(response_mask, entropy, 0.0).sum(), count)})
    return LossOutput(loss_sum=torch.where(response_mask, -logprobs, 0.0).sum(), count=count, metrics=metrics)


# (inputs, *, option=default) -> LossOutput
POLICY_LOSSES: dict[str, Callable[..., LossOutput]] = {
    "clip": clipped_surrogate,
    "reinforce": reinforce,
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "ce_gppo": ce_gppo,
    "dcpo": dcpo,
    "region": region_study,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "high_entropy": high_entropy,
    "archer": archer,
    "steer": steer,
}

# Those whose result depends on inputs.bounds; under the others a schedule of clip distances would do nothing.
READS_BOUNDS = frozenset({"clip", "ce_gppo", "region", "clip_cov", "high_entropy", "steer"})

# (tokens of a whole update, *, option=default) -> [N] fp32, which the loss of that name finds in inputs.marks.
MARKS: dict[str, Callable[..., Tensor]] = {
    "clip_cov": clip_cov_marks,
    "kl_cov": kl_cov_marks,
    "high_entropy": high_entropy_marks,
    "archer": archer_marks,
    "steer": steer_marks,
}

# (inputs, *, option=default) -> Addition
ADDITIONS: dict[str, Callable[..., Addition]] = {
    "entropy_bonus": entropy_bonus,
    "adaptive_entropy_bonus": adaptive_entropy_bonus,
    "kl": kl,
    "truncated_importance": truncated_importance,
    "masked_importance": masked_importance,
}
