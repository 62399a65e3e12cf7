"""Policy losses that look at one token (GSPO: one response) at a time. None has a branch on the entropy schedule.

r is the importance ratio, its log clamped to +-LossInputs.log_ratio_clamp; A the advantage. Where the text says "source:",
it names the aggregation that the source uses; the loss uses the one that is configured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from megatron_fec.algorithm.aggregation import RATIO_MOVED, log_ratio, loss_output, response_sums
from megatron_fec.algorithm.options import AboveOne, Inside, NotNegative, Positive, Share
from megatron_fec.algorithm.regions import LIKELY, REGION_RATIO, UNLIKELY, region_masks
from megatron_fec.types import ClipBounds, LossInputs, LossOutput

SEQUENCE_CLAMP = 10.0  # GSPO: a response whose log ratio is above it carries no gradient


class ClipMasks(TypedDict):
    """[T] bool, where a bound acts; the keywords of loss_output."""

    clipped_upper: Tensor
    clipped_lower: Tensor
    dual_clipped: NotRequired[Tensor]


def clipped_surrogate(inputs: LossInputs, *, dual_clip: AboveOne | None = None) -> LossOutput:
    """max(-A r, -A clip(r, 1 - eps_lower, 1 + eps_upper)): minus the objective of arXiv 2602.09782, 4.2.

    With constant bounds it is GRPO's (arXiv 2402.03300, source: seq_mean_token_mean; DAPO, arXiv 2503.14476, and verl:
    token_mean). With dual_clip c, the loss of a token with A < 0 is at most -A c (arXiv 1912.09729; verl 3, DAPO 10).
    The gradient with respect to logprobs is -A r, and exactly 0 where a bound, c or the log-ratio clamp acts.
    """
    return _clipped(log_ratio(inputs).exp(), inputs, dual_clip=dual_clip)


def reinforce(inputs: LossInputs) -> LossOutput:
    """-A ln p, with neither ratio nor clip; its gradient is -A. Williams, 1992; source: token_mean."""
    return loss_output(-inputs.advantages * _logprobs(inputs), inputs)


def gspo(
    inputs: LossInputs, *, sequence_eps_lower: Inside = 3e-4, sequence_eps_upper: Positive = 4e-4
) -> LossOutput:
    """The clipped surrogate of one ratio a response, s = exp(mean of ln p - ln q over it); arXiv 2507.18071.

    The token form: s is a constant times p / (p without gradient), so the gradient of a token is -A s, and 0 where s is
    clipped or ln s > SEQUENCE_CLAMP. With one A a response it is the gradient of the paper's sequence form.
    Source: seq_mean_token_mean; defaults of the paper. Two collectives where a sequence is split over ranks.
    """
    ours = torch.where(inputs.response_mask, inputs.logprobs - inputs.old_logprobs, 0.0)
    total, count = response_sums(ours, inputs, "gspo")
    mean = (total / count.clamp(min=1)).to(ours.dtype)
    log_sequence_ratio = (mean + (ours - ours.detach())).clamp(max=SEQUENCE_CLAMP)
    bounds = ClipBounds(
        eps_lower=torch.full_like(mean, sequence_eps_lower),
        eps_upper=torch.full_like(mean, sequence_eps_upper),
    )
    return _clipped(log_sequence_ratio.exp(), replace(inputs, bounds=bounds))


def sapo(inputs: LossInputs, *, tau_positive: Positive = 1.0, tau_negative: Positive = 1.05) -> LossOutput:
    """-A sigmoid(tau (r - 1)) 4 / tau, with tau_positive where A > 0, else tau_negative; arXiv 2511.20347.

    The gradient is -A 4 g (1 - g) r with g the sigmoid: -A at r = 1, where the value is -2 A / tau, and fading on both
    sides. Nothing is clipped. Source: seq_mean_token_mean; defaults of verl and trl.
    """
    advantages = inputs.advantages
    tau = torch.where(advantages > 0, tau_positive, torch.full_like(advantages, tau_negative))
    gate = torch.sigmoid(tau * (log_ratio(inputs).exp() - 1))
    return loss_output(-advantages * gate * 4 / tau, inputs)


def cispo(inputs: LossInputs, *, ratio_min: Share = 0.0, ratio_max: AboveOne = 1.28) -> LossOutput:
    """-w A ln p with the constant w = clip(r, ratio_min, ratio_max); arXiv 2506.13585. The gradient, -w A, never vanishes.

    Source: token_mean. ratio_max is the cap itself (as trl's; verl's is the distance from 1), and there is no lower
    bound by default (as MiniMax and trl; verl has 1 - eps). ratio_capped: share of the tokens with A != 0 it acts on.
    """
    ratio = log_ratio(inputs).detach().exp()
    weight = ratio.clamp(ratio_min, ratio_max)
    capped = (weight != ratio) & (inputs.advantages != 0)
    return loss_output(
        -weight * inputs.advantages * _logprobs(inputs), inputs, metrics={"ratio_capped": capped}
    )


def ce_gppo(
    inputs: LossInputs,
    *,
    gradient_kept_lower: NotNegative = 0.75,
    gradient_kept_upper: NotNegative = 1.0,
    dual_clip: AboveOne | None = 10.0,
) -> LossOutput:
    """-A r; what the bounds would clip keeps the gradient -A (1 - eps_lower) b1, or -A (1 + eps_upper) b2.

    CE-GPPO, arXiv 2509.20712: b1 = gradient_kept_lower, b2 = gradient_kept_upper, and the value of such a token is that
    gradient too. The clip fractions count these tokens. Source: token_mean, eps 0.2, b1 0.75 (7B; 0.5 for 1.5B; the
    repository's function and yaml have 0.25).
    """
    d, bounds = log_ratio(inputs), inputs.bounds
    ratio, one = d.exp(), (d - d.detach()).exp()  # one: value 1, gradient that of ln p
    masks = clip_masks(ratio, inputs, dual_clip=dual_clip)
    factor = torch.where(masks["clipped_lower"], gradient_kept_lower * (1 - bounds.eps_lower) * one, ratio)
    factor = torch.where(masks["clipped_upper"], gradient_kept_upper * (1 + bounds.eps_upper) * one, factor)
    return loss_output(_dual_clip(-inputs.advantages * factor, ratio, inputs, dual_clip), inputs, **masks)


def dcpo(
    inputs: LossInputs,
    *,
    dcpo_eps_lower: Positive = 0.16,
    dcpo_eps_upper: Positive = 0.2,
    dcpo_ratio_max: AboveOne = 10.0,
    dual_clip: AboveOne | None = 10.0,
) -> LossOutput:
    """The clipped surrogate with bounds from the old probability q; arXiv 2509.02333. Rare tokens may move further.

    lowest ratio 1/2 + sqrt(max(1 - 4 eps_lower / q, 0)) / 2, never under 1/2; highest
    1/2 + sqrt(1 + 4 eps_upper / q) / 2, at most dcpo_ratio_max. Defaults of the paper (its script has 0.2 and 0.28).
    Source: the sum of the responses' token means, that is seq_mean_token_mean but for the divisor.
    """
    q = torch.where(inputs.response_mask, inputs.old_logprobs, 0.0).exp()
    lowest = 0.5 + 0.5 * (1 - 4 * dcpo_eps_lower / q).clamp(min=0).sqrt()
    highest = (0.5 + 0.5 * (1 + 4 * dcpo_eps_upper / q).sqrt()).clamp(max=dcpo_ratio_max)
    bounds = ClipBounds(eps_lower=1 - lowest, eps_upper=highest - 1)
    return _clipped(log_ratio(inputs).exp(), replace(inputs, bounds=bounds), dual_clip=dual_clip)


def region_study(
    inputs: LossInputs,
    *,
    region: Literal["E1", "E2", "E3", "E4"],
    mode: Literal["only", "extend"] = "only",
    dual_clip: AboveOne | None = None,
) -> LossOutput:
    """The clipped surrogate of the region study, section 3 and Fig. 2c of arXiv 2602.09782.

    On the side of the region (r > 1 with A > 0 for E1 and E2, r < 1 with A < 0 for E3 and E4), tokens of its kind (p > 0.7
    for E1 and E3, p <= 0.3 for E2 and E4) may move by 0.3. The others on that side: `only` clips them once they have moved
    by RATIO_MOVED, more than the kernel's noise; `extend` leaves them inputs.bounds, which the other side always has. The
    paper gives no formula; `only` is the reading that its figure's signs need. Source: as the clipped surrogate.
    region_share: share of tokens inside the region.
    """
    p = inputs.logprobs.detach().exp()
    is_kind = p > LIKELY if region in ("E1", "E3") else p <= UNLIKELY
    side = "eps_upper" if region in ("E1", "E2") else "eps_lower"
    rest = getattr(inputs.bounds, side) if mode == "extend" else torch.full_like(p, RATIO_MOVED)
    bounds = replace(inputs.bounds, **{side: torch.where(is_kind, REGION_RATIO, rest)})
    ratio = log_ratio(inputs).exp()
    losses, masks = clip_losses(ratio, replace(inputs, bounds=bounds), dual_clip=dual_clip)
    share = region_masks(p, ratio.detach(), inputs.advantages)[region]
    return loss_output(losses, replace(inputs, bounds=bounds), **masks, metrics={"region_share": share})


def clip_losses(
    ratio: Tensor, inputs: LossInputs, *, dual_clip: float | None = None
) -> tuple[Tensor, ClipMasks]:
    """([T] losses of the clipped surrogate of this ratio, the masks of what was clipped)."""
    advantages = inputs.advantages
    clipped = ratio.clamp(1 - inputs.bounds.eps_lower, 1 + inputs.bounds.eps_upper)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    return _dual_clip(losses, ratio, inputs, dual_clip), clip_masks(ratio, inputs, dual_clip=dual_clip)


def clip_masks(ratio: Tensor, inputs: LossInputs, *, dual_clip: float | None) -> ClipMasks:
    """Where the ratio has left its range on the side to which the advantage pushes it; the dual clip is on the other."""
    advantages, bounds = inputs.advantages, inputs.bounds
    masks = ClipMasks(
        clipped_upper=(advantages > 0) & (ratio > 1 + bounds.eps_upper),
        clipped_lower=(advantages < 0) & (ratio < 1 - bounds.eps_lower),
    )
    if dual_clip is not None:
        masks["dual_clipped"] = (advantages < 0) & (ratio > dual_clip)
    return masks


def _dual_clip(losses: Tensor, ratio: Tensor, inputs: LossInputs, dual_clip: float | None) -> Tensor:
    """The losses, those of tokens with A < 0 at most -A c."""
    if dual_clip is None:
        return losses
    acts = (inputs.advantages < 0) & (ratio > dual_clip)
    return torch.where(acts, -inputs.advantages * dual_clip, losses)


def _clipped(ratio: Tensor, inputs: LossInputs, *, dual_clip: float | None = None) -> LossOutput:
    losses, masks = clip_losses(ratio, inputs, dual_clip=dual_clip)
    return loss_output(losses, inputs, **masks)


def _logprobs(inputs: LossInputs) -> Tensor:
    return torch.where(inputs.response_mask, inputs.logprobs, 0.0)
