"""What one step of a strategy does to entropy, predicted to first order from [T] tensors; eq. (5) of arXiv 2602.09782.

A loss reaches the logits z of token t through its log-probability, with g_t = d loss_sum / d logprob_t. The step
z <- z - d loss_sum / d z changes the entropy of the token's distribution to first order by

    dH_t = -g_t alignment_t,    alignment_t = <grad ln p, grad H> = B - p (ln p + H)

The inner product is exact: it keeps the term B that the paper's eq. (6) drops. What is left out: tokens share weights,
the optimizer scales the step, and an entropy bonus reaches the logits not through the log-probability alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatron_fec.algorithm.aggregation import AGGREGATIONS
from megatron_fec.algorithm.regions import region_masks
from megatron_fec.types import LossInputs, LossOutput

BINS = 5  # of the probability, equally wide
# Below it the sign of p (ln p + H) is decided by the rounding of fp32 statistics, not by the distribution.
SIGN_MARGIN = 5e-6
REGIONS = ("E1", "E2", "E3", "E4")


def token_gradients(policy_loss: Callable[[LossInputs], LossOutput], inputs: LossInputs) -> Tensor:
    """[T] d loss_sum / d logprob of any policy loss, in the dtype of logprobs; 0 outside the response, no graph.

    The loss is evaluated once more, on a leaf of its own: what it gives the entropy is not followed.
    """
    with torch.enable_grad():
        leaf = inputs.logprobs.detach().requires_grad_()
        output = policy_loss(replace(inputs, logprobs=leaf))
        (gradients,) = torch.autograd.grad(output.loss_sum, leaf)
    return torch.where(inputs.response_mask, gradients, 0.0)


def unclipped_gradients(inputs: LossInputs) -> Tensor:
    """[T] the same for -A r, aggregated and with the weights of the inputs: the step before any strategy cut it.

    Beyond the log-ratio clamp it is 0: the clamp guards numbers and is no strategy.
    """
    log_ratio = inputs.logprobs.detach() - inputs.old_logprobs
    with torch.enable_grad():
        losses = torch.zeros_like(log_ratio, requires_grad=True)
        (shares,) = torch.autograd.grad(AGGREGATIONS[inputs.aggregation](losses, inputs)[0], losses)
    if inputs.weights is not None:
        shares = shares * inputs.weights
    counts = inputs.response_mask & (log_ratio.abs() <= inputs.log_ratio_clamp)
    return torch.where(counts, -inputs.advantages * log_ratio.exp() * shares, 0.0)


@torch.no_grad()
def entropy_change_metrics(
    gradients: Tensor, inputs: LossInputs, *, old_entropy: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (sum, count) over response tokens, the same names in the same order for every micro-batch.

    gradients: [T] of token_gradients. Each count is the number of response tokens, so the parts of a split add up.
    predicted: dH of the step. unclipped: dH without the strategy, and its part on tokens that the strategy cut:
    A != 0 and no gradient.
    region_E1 to region_E4 and region_none, surprisal_E1 to surprisal_E4 (high where -ln p < H), and
    positive_p0.0 to negative_p0.8 (sign of A, and the lower edge of a fifth of p) are splits of `predicted`.
    polarity_up, polarity_down: the positive and the negative part of A * alignment.
    wrong_sign: share of tokens with 0 < p (ln p + H) < B, where eq. (6) predicts the wrong direction.
    advantage, logprob, product: what `derived` makes the covariance of.
    measured: entropy - old_entropy, left out without old_entropy: what the updates since the rollout really did.
    """
    assert inputs.alignment is not None and inputs.entropy is not None
    advantages, alignment = inputs.advantages.double(), inputs.alignment.double()
    logprobs, entropy = inputs.logprobs.detach().double(), inputs.entropy.detach().double()
    change = -gradients.double() * alignment
    unclipped = -unclipped_gradients(inputs).double() * alignment
    is_cut = (gradients == 0) & (advantages != 0)
    polarity = advantages * alignment
    first_term = logprobs.exp() * (logprobs + entropy)
    values = {
        "predicted": change,
        "unclipped": unclipped,
        "unclipped_of_cut": torch.where(is_cut, unclipped, 0.0),
        **_splits(change, inputs),
        "polarity_up": polarity.clamp(min=0),
        "polarity_down": polarity.clamp(max=0),
        "wrong_sign": (first_term > SIGN_MARGIN) & (alignment > SIGN_MARGIN),
        "advantage": advantages,
        "logprob": logprobs,
        "product": advantages * logprobs,
    }
    if old_entropy is not None:
        values["measured"] = entropy - old_entropy.double()
    mask, count = inputs.response_mask, inputs.response_mask.sum()
    return {
        f"dH/{name}": (torch.where(mask, value.double(), 0.0).sum(), count) for name, value in values.items()
    }


def derived(means: Mapping[str, float]) -> dict[str, float]:
    """What follows from the means of entropy_change_metrics: the covariance of advantage and log-probability."""
    return {"dH/covariance": means["dH/product"] - means["dH/advantage"] * means["dH/logprob"]}


def _splits(change: Tensor, inputs: LossInputs) -> dict[str, Tensor]:
    """[T] parts of `change`: by region, by surprisal against entropy, and by probability with the sign of A."""
    assert inputs.entropy is not None
    logprobs, advantages = inputs.logprobs.detach(), inputs.advantages
    probs, ratio = logprobs.exp(), (logprobs - inputs.old_logprobs).exp()
    regions = region_masks(probs, ratio, advantages)
    outside = ~torch.stack(list(regions.values())).any(0)
    is_likely = -logprobs < inputs.entropy.detach()
    up, down = advantages > 0, advantages < 0
    surprisal = zip(
        REGIONS, (up & is_likely, up & ~is_likely, down & is_likely, down & ~is_likely), strict=True
    )
    fifth = (probs * BINS).floor().clamp(0, BINS - 1)
    parts = {
        **{f"region_{name}": mask for name, mask in (regions | {"none": outside}).items()},
        **{f"surprisal_{name}": mask for name, mask in surprisal},
        **{f"positive_p{i / BINS:.1f}": up & (fifth == i) for i in range(BINS)},
        **{f"negative_p{i / BINS:.1f}": down & (fifth == i) for i in range(BINS)},
    }
    return {name: torch.where(mask, change, 0.0) for name, mask in parts.items()}
