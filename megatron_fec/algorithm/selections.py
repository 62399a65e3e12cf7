"""Policy losses that choose among tokens by a statistic of many: of a whole update, or of what one forward sees.

Each has a function of UpdateTokens here, its marks: [N] fp32, the same on every rank that holds the same tokens. With
stat_scope=batch the trainer evaluates it over all tokens of an update and the loss reads inputs.marks, so the choice
does not depend on the micro-batch size or the layout; with stat_scope=micro, as upstream code does, the loss
evaluates it over its own micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_fec.algorithm.additions import kl_estimate
from megatron_fec.algorithm.aggregation import AGGREGATIONS, log_ratio, loss_output, needed, responses
from megatron_fec.algorithm.options import AboveOne, Inside, NotNegative, Positive
from megatron_fec.algorithm.surrogates import clip_losses
from megatron_fec.errors import ConfigError
from megatron_fec.types import ClipBounds, LossInputs, LossOutput, UpdateTokens

Scope = Literal["batch", "micro"]
CANDIDATE, CHOSEN = 1.0, 2.0  # marks of Clip-Cov
OMEGA_FLOOR = 0.02  # STEER: where all |Omega| are smaller, its weights stay near 1


def clip_cov(
    inputs: LossInputs,
    *,
    clip_cov_share: Inside = 2e-4,
    clip_cov_low: float = 1.0,
    clip_cov_high: float = 5.0,
    stat_scope: Scope = "batch",
) -> LossOutput:
    """The clipped surrogate, with neither loss nor gradient on tokens drawn at random from those of high covariance.

    Clip-Cov, arXiv 2505.22617; source: token_mean, statistics of a micro-batch, and bounds near 1 "only to filter
    extremes". cov_candidates, cov_chosen: shares of the tokens that could be drawn, and that were.
    """
    options = {"clip_cov_share": clip_cov_share, "clip_cov_low": clip_cov_low, "clip_cov_high": clip_cov_high}
    marks = _marks(clip_cov_marks, inputs, stat_scope, "clip_cov", **options)
    losses, masks = clip_losses(log_ratio(inputs).exp(), inputs)
    metrics = {"cov_candidates": marks >= CANDIDATE, "cov_chosen": marks >= CHOSEN}
    return loss_output(torch.where(metrics["cov_chosen"], 0.0, losses), inputs, **masks, metrics=metrics)


def clip_cov_marks(
    tokens: UpdateTokens,
    *,
    clip_cov_share: Inside = 2e-4,
    clip_cov_low: float = 1.0,
    clip_cov_high: float = 5.0,
) -> Tensor:
    """CANDIDATE where clip_cov_low < covariance < clip_cov_high and no bound clips; CHOSEN for max(share N, 1) of these."""
    ratio = _ratio(tokens)
    advantages, bounds = tokens.advantages, tokens.bounds
    clipped = (advantages > 0) & (ratio > 1 + bounds.eps_upper)
    clipped |= (advantages < 0) & (ratio < 1 - bounds.eps_lower)
    covariance = _covariance(tokens)
    candidates = (covariance > clip_cov_low) & (covariance < clip_cov_high) & ~clipped
    (places,) = candidates.nonzero(as_tuple=True)
    # From a generator on the CPU: the same draw on every rank and kind of device.
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(tokens.seed))
    drawn = order[: max(int(clip_cov_share * len(candidates)), 1)].to(places.device)
    marks = candidates.float() * CANDIDATE
    marks[places[drawn]] = CHOSEN
    return marks


def kl_cov(
    inputs: LossInputs,
    *,
    kl_cov_share: Inside = 2e-3,
    kl_cov_coef: Positive = 1.0,
    stat_scope: Scope = "batch",
) -> LossOutput:
    """-A r, plus kl_cov_coef |ln p - ln q| on the tokens of highest covariance; nothing is clipped.

    KL-Cov, arXiv 2505.22617; source: token_mean, statistics of a micro-batch, share 2e-3 for 7B and 2e-4 for 32B.
    The penalty has no gradient at r = 1, so none in the first update of a step. cov_chosen: share of these tokens.
    """
    chosen = _marks(kl_cov_marks, inputs, stat_scope, "kl_cov", kl_cov_share=kl_cov_share) > 0
    distance = torch.where(inputs.response_mask, inputs.logprobs - inputs.old_logprobs, 0.0).abs()
    losses = -inputs.advantages * log_ratio(inputs).exp() + kl_cov_coef * torch.where(chosen, distance, 0.0)
    return loss_output(losses, inputs, metrics={"cov_chosen": chosen})


def kl_cov_marks(tokens: UpdateTokens, *, kl_cov_share: Inside = 2e-3) -> Tensor:
    """1 on the max(1, share N) tokens of highest covariance, the earlier one of equals; 0 elsewhere."""
    covariance = _covariance(tokens)
    order = covariance.argsort(descending=True, stable=True)
    marks = torch.zeros_like(covariance, dtype=torch.float32)
    marks[order[: max(int(kl_cov_share * len(order)), 1)]] = 1.0
    return marks


def high_entropy(
    inputs: LossInputs,
    *,
    high_entropy_share: Inside = 0.2,
    dual_clip: AboveOne | None = None,
    stat_scope: Scope = "batch",
) -> LossOutput:
    """The clipped surrogate on the share of tokens of highest entropy; the others count in the mean, with loss 0.

    The 80/20 rule, arXiv 2506.01939; source: token_mean, the quantile over all tokens of a batch. high_entropy_kept:
    share of the tokens that remain. The clip fractions count all tokens beyond a bound.
    """
    marks = _marks(
        high_entropy_marks, inputs, stat_scope, "high_entropy", high_entropy_share=high_entropy_share
    )
    losses, masks = clip_losses(log_ratio(inputs).exp(), inputs, dual_clip=dual_clip)
    kept = marks > 0
    return loss_output(torch.where(kept, losses, 0.0), inputs, **masks, metrics={"high_entropy_kept": kept})


def high_entropy_marks(tokens: UpdateTokens, *, high_entropy_share: Inside = 0.2) -> Tensor:
    """1 where the entropy is at least its (1 - share) quantile, linear between neighbours; 0 elsewhere."""
    if len(tokens.entropy) == 0:
        return tokens.entropy.float()
    # At least the interpolated value means at least the entropy at the next whole rank.
    rank = math.ceil((1 - _exact(high_entropy_share)) * (len(tokens.entropy) - 1))
    return (tokens.entropy >= tokens.entropy.sort().values[rank]).float()


def archer(
    inputs: LossInputs,
    *,
    archer_quantile: Inside = 0.8,
    reasoning_eps: Inside = 0.5,
    knowledge_eps: Inside = 0.2,
    archer_kl_coef: NotNegative = 0.001,
    dual_clip: AboveOne | None = None,
    stat_scope: Scope = "micro",
) -> LossOutput:
    """The clipped surrogate with a wide range for reasoning tokens, and a narrow one and a KL for knowledge tokens.

    Archer, arXiv 2507.15778 (arXiv 2602.09782 calls it TDPO): a reasoning token's entropy is above the quantile of its
    response. The KL to the reference is k3, averaged over the knowledge tokens alone, as the aggregation averages; its
    coefficient is not known from a source, 0 needs no reference. Importance weights leave it alone. Source: token_mean.
    Upstream's `high_entropy_mask` is True on knowledge tokens. knowledge_kl: that KL, before its coefficient.
    """
    marks = _marks(archer_marks, inputs, stat_scope, "archer", archer_quantile=archer_quantile)
    reasoning = marks > 0
    eps = torch.where(reasoning, reasoning_eps, torch.full_like(inputs.logprobs, knowledge_eps))
    inputs = replace(inputs, bounds=ClipBounds(eps_lower=eps, eps_upper=eps))
    losses, masks = clip_losses(log_ratio(inputs).exp(), inputs, dual_clip=dual_clip)
    kl = torch.zeros_like(inputs.logprobs)
    if archer_kl_coef > 0:
        divergence = kl_estimate(inputs, "k3", "archer with archer_kl_coef > 0")
        kl = torch.where(reasoning, 0.0, divergence) * _knowledge_scale(inputs, archer_quantile)
    output = loss_output(losses, inputs, **masks, metrics={"reasoning_share": reasoning, "knowledge_kl": kl})
    kl_sum, _ = AGGREGATIONS[inputs.aggregation](archer_kl_coef * kl, inputs)
    return replace(output, loss_sum=output.loss_sum + kl_sum)


def archer_marks(tokens: UpdateTokens, *, archer_quantile: Inside = 0.8) -> Tensor:
    """1 where the entropy is above the quantile of its response, linear between neighbours; 0 elsewhere."""
    entropy = tokens.entropy
    _, owners, lengths = torch.unique_consecutive(
        tokens.sequence_ids, return_inverse=True, return_counts=True
    )
    # Each response sorted in its place: by entropy, then, stably, by response.
    order = entropy.argsort(stable=True)
    order = order[owners[order].argsort(stable=True)]
    # Above the interpolated value means above the entropy at the whole rank below it.
    places = lengths.cumsum(0) - lengths + _rank_below(lengths, archer_quantile)
    return (entropy > entropy[order][places][owners]).float()


def steer(
    inputs: LossInputs,
    *,
    form: Literal["code", "paper", "exact"] = "code",
    weight_map: Literal["exp", "linear"] = "exp",
    weight_min: Inside = 0.8,
    weight_max: AboveOne = 1.2,
    dual_clip: AboveOne | None = 10.0,
    stat_scope: Scope = "batch",
) -> LossOutput:
    """The clipped surrogate, each token weighed less the more it changes the entropy; the weights have no gradient.

    STEER, arXiv 2510.10150; source: token_mean, eps 0.2 and 0.28, statistics of a micro-batch. steer_weight: mean weight.
    """
    options = {"form": form, "weight_map": weight_map, "weight_min": weight_min, "weight_max": weight_max}
    weights = _marks(steer_marks, inputs, stat_scope, "steer", **options).to(inputs.logprobs.dtype)
    losses, masks = clip_losses(log_ratio(inputs).exp(), inputs, dual_clip=dual_clip)
    return loss_output(losses * weights, inputs, **masks, metrics={"steer_weight": weights})


def steer_marks(
    tokens: UpdateTokens,
    *,
    form: Literal["code", "paper", "exact"] = "code",
    weight_map: Literal["exp", "linear"] = "exp",
    weight_min: Inside = 0.8,
    weight_max: AboveOne = 1.2,
) -> Tensor:
    """The weights, from x = |Omega|, the change of entropy that a token's gradient makes.

    code: Omega = A r (1 - p) (ln p + H), as the authors' repository has it; paper: (1 - p)^2, eq. 14; exact:
    A r <grad ln p, grad H>, which needs alignment. exp: w = weight_min^(x / max(x, OMEGA_FLOOR)) in [weight_min, 1]; linear:
    from weight_max at the smallest x to weight_min at the largest, half way where all are equal.
    """
    if len(tokens.logprobs) == 0:
        return tokens.logprobs.float()
    logprobs, entropy = tokens.logprobs.double(), tokens.entropy.double()
    rest = 1 - logprobs.exp()
    if form == "exact":
        effect = needed(tokens.alignment, "alignment", "steer with form=exact").double()
    else:
        effect = rest ** (1 if form == "code" else 2) * (logprobs + entropy)
    omega = (tokens.advantages.double() * _ratio(tokens) * effect).abs()
    if weight_map == "exp":
        weights = (
            (math.log(weight_min) * omega / omega.max().clamp(min=OMEGA_FLOOR)).exp().clamp(weight_min, 1.0)
        )
    else:
        spread = omega.max() - omega.min()
        place = torch.where(spread > 0, (omega - omega.min()) / spread, 0.5)
        weights = weight_max - (weight_max - weight_min) * place
    return weights.float()


def _marks(
    function: Callable[..., Tensor], inputs: LossInputs, stat_scope: Scope, user: str, **options: Any
) -> Tensor:
    """[T] marks: those of the whole update that the trainer made, or of this micro-batch; 0 outside the response then."""
    if stat_scope == "batch":
        remedy = "Evaluate its function in losses.MARKS over the update's tokens, or use stat_scope=micro."
        return needed(inputs.marks, "marks", f"{user} with stat_scope=batch", remedy)
    if inputs.context_group is not None:
        raise ConfigError(
            "algorithm.options.stat_scope=micro needs whole responses, and policy.context_parallel splits them over "
            "ranks. Use algorithm.options.stat_scope=batch."
        )
    tokens, places = _own_tokens(inputs, f"{user} with stat_scope=micro")
    marks = torch.zeros(len(inputs.logprobs), dtype=torch.float32, device=inputs.logprobs.device)
    return marks.index_copy(0, places, function(tokens, **options))


def _own_tokens(inputs: LossInputs, user: str) -> tuple[UpdateTokens, Tensor]:
    """The response tokens of this micro-batch in the order of sequence ids, and the places they come from."""
    ids = needed(inputs.sequence_ids, "sequence_ids", user)
    (places,) = inputs.response_mask.nonzero(as_tuple=True)
    places = places[ids[places].argsort(stable=True)]

    def own(values: Tensor) -> Tensor:
        return values.detach().expand_as(ids)[places]

    tokens = UpdateTokens(
        logprobs=own(inputs.logprobs),
        old_logprobs=own(inputs.old_logprobs),
        advantages=own(inputs.advantages),
        entropy=own(needed(inputs.entropy, "entropy", user)),
        alignment=None if inputs.alignment is None else own(inputs.alignment),
        bounds=ClipBounds(eps_lower=own(inputs.bounds.eps_lower), eps_upper=own(inputs.bounds.eps_upper)),
        sequence_ids=ids[places],
        log_ratio_clamp=inputs.log_ratio_clamp,
        seed=inputs.seed,
    )
    return tokens, places


def _ratio(tokens: UpdateTokens) -> Tensor:
    difference = tokens.logprobs.double() - tokens.old_logprobs.double()
    return difference.clamp(-tokens.log_ratio_clamp, tokens.log_ratio_clamp).exp()


def _covariance(tokens: UpdateTokens) -> Tensor:
    """[N] fp64 (A - mean A) (ln p - mean ln p), eq. 8 of arXiv 2505.22617."""
    advantages, logprobs = tokens.advantages.double(), tokens.logprobs.double()
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())


def _rank_below(lengths: Tensor, quantile: float) -> Tensor:
    """floor(quantile (n - 1)) of each length, without the rounding of quantile: 0.29 * 100 is below 29 in floats."""
    exact = _exact(quantile)
    return ((lengths - 1) * exact.numerator).floor_divide(exact.denominator)


def _exact(value: float) -> Fraction:
    return Fraction(str(value)).limit_denominator(10**6)


def _knowledge_scale(inputs: LossInputs, quantile: float) -> Tensor | float:
    """What turns the aggregation's mean over all tokens into one over the knowledge tokens, if no entropies are equal."""
    if inputs.aggregation == "token_mean":
        lengths = needed(inputs.update_lengths, "update_lengths", "archer with archer_kl_coef > 0")
        lengths = lengths[lengths > 0]
        return lengths.sum() / (_rank_below(lengths, quantile) + 1).sum()
    if inputs.aggregation == "seq_mean_token_mean":
        lengths = responses(inputs)[0].clamp(min=1)
        return lengths / (_rank_below(lengths, quantile) + 1)
    return 1.0  # a sum over the tokens of a response
