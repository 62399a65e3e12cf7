"""Policy losses of one micro-batch as (sum, count), and the metrics that all of them report.

A loss has no branch on the entropy schedule: it sees ClipBounds. Only response tokens count; whatever stands
in the other positions, NaN included, reaches neither the loss nor its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_fec.metrics import MetricSums
from megatron_fec.types import LossInputs, LossOutput

# Two fp32 log-probs of an unchanged policy may differ by about 1e-5 when the packing differs (each is known
# to 2e-6 + 5e-7 |logprob|); the nearest clip bound is a thousand times further.
RATIO_MOVED = 1e-5


def clipped_surrogate(inputs: LossInputs) -> LossOutput:
    """max(-A r, -A clip(r, 1 - eps_lower, 1 + eps_upper)): minus the objective of arXiv 2602.09782, 4.2.

    With constant bounds it is GRPO's. With `dual_clip` c, the loss of a token with A < 0 is at most -A c
    (arXiv 1912.09729).
    The gradient with respect to logprobs is -A r, and exactly 0 where a bound, c or the log-ratio clamp acts.
    """
    advantages = inputs.advantages
    ratio = _log_ratio(inputs).exp()
    clipped = ratio.clamp(1 - inputs.bounds.eps_lower, 1 + inputs.bounds.eps_upper)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    if inputs.dual_clip is not None:
        losses = torch.where(_is_dual_clipped(inputs, ratio), -advantages * inputs.dual_clip, losses)
    loss_sum, count = AGGREGATIONS[inputs.aggregation](losses, inputs)
    return LossOutput(loss_sum=loss_sum, count=count, metrics=policy_metrics(inputs))


def negative_log_likelihood(logprobs: Tensor, entropy: Tensor, response_mask: Tensor) -> LossOutput:
    """Supervised loss of the response tokens, all [T]; the count is their number."""
    count = response_mask.sum()
    metrics = MetricSums.of({"entropy": (torch.where(response_mask, entropy, 0.0).sum(), count)})
    return LossOutput(loss_sum=torch.where(response_mask, -logprobs, 0.0).sum(), count=count, metrics=metrics)


@torch.no_grad()
def policy_metrics(inputs: LossInputs) -> MetricSums:
    """What a policy loss reports, as sums over response tokens and their number; without gradient.

    ratio_moved: share of tokens whose |log ratio| exceeds RATIO_MOVED.
    log_ratio_abs: mean of |logprob - old_logprob|.
    approx_kl: the k3 estimator exp(d) - 1 - d with d = logprob - old_logprob, clamped as in the loss. The
    tokens were sampled by the old policy, so it estimates KL(old || new) and is never negative.
    entropy is left out where the inputs have none.
    """
    mask, bounds = inputs.response_mask, inputs.bounds
    log_ratio = _log_ratio(inputs)
    ratio = log_ratio.exp()
    distance = (inputs.logprobs - inputs.old_logprobs).abs()
    log_ratio = log_ratio.double()  # exp(d) - 1 - d is d^2 / 2, below the rounding of fp32
    values = {
        "eps_upper_mean": bounds.eps_upper,
        "eps_lower_mean": bounds.eps_lower,
        "clip_fraction_upper": (inputs.advantages > 0) & (ratio > 1 + bounds.eps_upper),
        "clip_fraction_lower": (inputs.advantages < 0) & (ratio < 1 - bounds.eps_lower),
        "dual_clip_fraction": _is_dual_clipped(inputs, ratio),
        "ratio_moved": distance > RATIO_MOVED,
        "log_ratio_abs": distance,
        "approx_kl": torch.expm1(log_ratio) - log_ratio,
    }
    if inputs.entropy is not None:
        values = {"entropy": inputs.entropy, **values}
    count = mask.sum()
    return MetricSums.of(
        {name: (torch.where(mask, value.double(), 0.0).sum(), count) for name, value in values.items()},
        {
            "eps_upper": _in_response(bounds.eps_upper, mask),
            "eps_lower": _in_response(bounds.eps_lower, mask),
        },
    )


def _log_ratio(inputs: LossInputs) -> Tensor:
    """[T] clamped log of the importance ratio, 0 outside the response; without gradient there and beyond the clamp."""
    log_ratio = torch.where(inputs.response_mask, inputs.logprobs - inputs.old_logprobs, 0.0)
    return log_ratio.clamp(-inputs.log_ratio_clamp, inputs.log_ratio_clamp)


def _is_dual_clipped(inputs: LossInputs, ratio: Tensor) -> Tensor:
    """[T] bool, True where the dual clip bounds the loss."""
    if inputs.dual_clip is None:
        return torch.zeros_like(inputs.response_mask)
    return inputs.response_mask & (inputs.advantages < 0) & (ratio > inputs.dual_clip)


def _in_response(eps: Tensor, mask: Tensor) -> Tensor:
    """[T] values for a histogram of [0, 1], which skips -1; indexing by the mask would wait for the GPU."""
    return torch.where(mask, eps.clamp(max=1.0), -1.0)


def _token_mean(losses: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Every response token weighs the same."""
    return torch.where(inputs.response_mask, losses, 0.0).sum(), inputs.response_mask.sum()


def _seq_mean_token_mean(losses: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Every sequence weighs the same, and so does every token of a sequence."""
    lengths, count = _responses(inputs)
    per_token = torch.where(inputs.response_mask, losses, 0.0) / lengths.clamp(min=1).to(losses.dtype)
    return per_token.sum(), count


def _seq_mean_token_sum(losses: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """A sequence weighs as much as it has tokens, and the mean is over sequences."""
    return torch.where(inputs.response_mask, losses, 0.0).sum(), _responses(inputs)[1]


def _responses(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """[T] response tokens of each token's sequence, and how many sequences count here.

    A sequence that is split over ranks has its whole length on each of them and counts where its response starts.
    """
    if inputs.response_lengths is not None:
        assert inputs.response_starts is not None, "LossInputs.response_lengths needs response_starts"
        return inputs.response_lengths, (inputs.response_starts & inputs.response_mask).sum()
    assert inputs.sequence_ids is not None, f"aggregation {inputs.aggregation} needs LossInputs.sequence_ids"
    ids, inverse = torch.unique(inputs.sequence_ids, return_inverse=True)
    lengths = torch.zeros_like(ids).index_add(0, inverse, inputs.response_mask.to(ids.dtype))
    return lengths[inverse], (lengths > 0).sum()


POLICY_LOSSES: dict[str, Callable[[LossInputs], LossOutput]] = {"clip": clipped_surrogate}

# (token losses [T], inputs) -> (sum, count), to be added over micro-batches and ranks, then divided once.
AGGREGATIONS: dict[str, Callable[[Tensor, LossInputs], tuple[Tensor, Tensor]]] = {
    "token_mean": _token_mean,
    "seq_mean_token_mean": _seq_mean_token_mean,
    "seq_mean_token_sum": _seq_mean_token_sum,
}
