"""What every policy loss shares: the log ratio, sums over sequences, the aggregations, and the metrics.

Only response tokens count; whatever stands in the other positions, NaN included, reaches neither a loss nor its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fec.metrics import MetricSums
from megatron_fec.types import LossInputs, LossOutput

# Two fp32 log-probs of an unchanged policy may differ by about 1e-5 when the packing differs (each is known
# to 2e-6 + 5e-7 |logprob|); the nearest clip bound of the paper's methods is a thousand times further.
RATIO_MOVED = 1e-5


def log_ratio(inputs: LossInputs) -> Tensor:
    """[T] clamped log of the importance ratio, 0 outside the response; without gradient there and beyond the clamp."""
    difference = torch.where(inputs.response_mask, inputs.logprobs - inputs.old_logprobs, 0.0)
    return difference.clamp(-inputs.log_ratio_clamp, inputs.log_ratio_clamp)


def needed(value: Tensor | None, name: str, user: str, remedy: str = "Fill it in.") -> Tensor:
    """The value of LossInputs.`name`, or a ValueError where it is None."""
    if value is None:
        raise ValueError(f"{user} needs LossInputs.{name}, which is None. {remedy}")
    return value


def loss_output(
    losses: Tensor,
    inputs: LossInputs,
    *,
    clipped_upper: Tensor | None = None,
    clipped_lower: Tensor | None = None,
    dual_clipped: Tensor | None = None,
    metrics: Mapping[str, Tensor] | None = None,
) -> LossOutput:
    """The token losses [T] times inputs.weights, aggregated, with the metrics that all policy losses report.

    The clip masks are [T] bool, None where a loss does not clip. metrics: more [T] values, reported as token means.
    """
    if inputs.weights is not None:
        losses = losses * inputs.weights
    loss_sum, count = AGGREGATIONS[inputs.aggregation](losses, inputs)
    clips = {
        "clip_fraction_upper": clipped_upper,
        "clip_fraction_lower": clipped_lower,
        "dual_clip_fraction": dual_clipped,
    }
    return LossOutput(
        loss_sum=loss_sum, count=count, metrics=policy_metrics(inputs, clips=clips, metrics=metrics or {})
    )


@torch.no_grad()
def policy_metrics(
    inputs: LossInputs, *, clips: Mapping[str, Tensor | None], metrics: Mapping[str, Tensor]
) -> MetricSums:
    """What a policy loss reports, as sums over response tokens and their number; without gradient.

    eps_upper_mean, eps_lower_mean: the clip distances that the loss was given, whether it reads them or not.
    clips: share of response tokens that a bound acts on; 0 for None.
    ratio_moved: share of tokens whose |log ratio| exceeds RATIO_MOVED.
    log_ratio_abs: mean of |logprob - old_logprob|.
    approx_kl: the k3 estimator exp(d) - 1 - d with d = logprob - old_logprob, clamped as in the loss. The
    tokens were sampled by the old policy, so it estimates KL(old || new) and is never negative.
    entropy is left out where the inputs have none.
    """
    mask, bounds = inputs.response_mask, inputs.bounds
    distance = (inputs.logprobs - inputs.old_logprobs).abs()
    d = log_ratio(inputs).double()  # exp(d) - 1 - d is d^2 / 2, below the rounding of fp32
    values = {
        "eps_upper_mean": bounds.eps_upper,
        "eps_lower_mean": bounds.eps_lower,
        **{name: torch.zeros_like(mask) if clip is None else clip for name, clip in clips.items()},
        "ratio_moved": distance > RATIO_MOVED,
        "log_ratio_abs": distance,
        "approx_kl": torch.expm1(d) - d,
        **metrics,
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


def _in_response(eps: Tensor, mask: Tensor) -> Tensor:
    """[T] values for a histogram of [0, 1], which skips -1; indexing by the mask would wait for the GPU."""
    return torch.where(mask, eps.clamp(max=1.0), -1.0)


def response_sums(values: Tensor, inputs: LossInputs, user: str) -> tuple[Tensor, Tensor]:
    """(sum of the values over its whole response, number of its tokens) of every token: [T] fp64, without gradient.

    One all-reduce MAX and one SUM over inputs.context_group where there is one. A response may have no token on
    one of those ranks, so the sums are laid out by sequence id, which all of them know.
    """
    ids, mask = needed(inputs.sequence_ids, "sequence_ids", user), inputs.response_mask
    largest = torch.cat([ids, ids.new_zeros(1)]).max()
    if inputs.context_group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=inputs.context_group)
    columns = torch.stack([torch.where(mask, values.detach().double(), 0.0), mask.double()], dim=1)
    places = ids.clamp(min=0)  # padding has id -1, and adds 0
    sums = columns.new_zeros(int(largest) + 1, 2).index_add(0, places, columns)
    if inputs.context_group is not None:
        dist.all_reduce(sums, group=inputs.context_group)
    total, count = sums[places].unbind(1)
    return total, count


def _token_mean(losses: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Every response token weighs the same."""
    return torch.where(inputs.response_mask, losses, 0.0).sum(), inputs.response_mask.sum()


def _seq_mean_token_mean(losses: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Every sequence weighs the same, and so does every token of a sequence."""
    lengths, count = responses(inputs)
    per_token = torch.where(inputs.response_mask, losses, 0.0) / lengths.clamp(min=1).to(losses.dtype)
    return per_token.sum(), count


def _seq_mean_token_sum(losses: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """A sequence weighs as much as it has tokens, and the mean is over sequences."""
    return torch.where(inputs.response_mask, losses, 0.0).sum(), responses(inputs)[1]


def _seq_mean_token_sum_norm(losses: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """As seq_mean_token_sum, over the longest response that is allowed: Dr. GRPO, arXiv 2503.20783."""
    longest = inputs.max_response_tokens
    if longest is None:
        raise ValueError("aggregation seq_mean_token_sum_norm needs LossInputs.max_response_tokens. Set it.")
    total, count = _seq_mean_token_sum(losses, inputs)
    return total / longest, count


def responses(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """[T] response tokens of each token's sequence, and how many sequences count here.

    A sequence that is split over ranks has its whole length on each of them and counts where its response starts.
    """
    user = f"aggregation {inputs.aggregation}"
    if inputs.response_lengths is not None:
        starts = needed(inputs.response_starts, "response_starts", user)
        return inputs.response_lengths, (starts & inputs.response_mask).sum()
    ids, inverse = torch.unique(needed(inputs.sequence_ids, "sequence_ids", user), return_inverse=True)
    lengths = torch.zeros_like(ids).index_add(0, inverse, inputs.response_mask.to(ids.dtype))
    return lengths[inverse], (lengths > 0).sum()


# (token losses [T], inputs) -> (sum, count), to be added over micro-batches and ranks, then divided once.
AGGREGATIONS: dict[str, Callable[[Tensor, LossInputs], tuple[Tensor, Tensor]]] = {
    "token_mean": _token_mean,
    "seq_mean_token_mean": _seq_mean_token_mean,
    "seq_mean_token_sum": _seq_mean_token_sum,
    "seq_mean_token_sum_norm": _seq_mean_token_sum_norm,
}
