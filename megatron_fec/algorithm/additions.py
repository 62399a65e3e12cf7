"""What is added to a policy loss: entropy bonuses, KL to a reference policy, importance weights against the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_fec.algorithm.aggregation import needed, response_sums
from megatron_fec.algorithm.options import AboveOne, Inside, Positive
from megatron_fec.types import Addition, LossInputs


def entropy_bonus(inputs: LossInputs, *, entropy_coef: Positive = 0.001) -> Addition:
    """-c H with the exact entropy of each token's distribution; the gradient with respect to it is -c.

    Aggregated as the policy loss is. The Entropy-Reg baseline of arXiv 2602.09782, which gives no c: 0.001 is our choice.
    """
    return Addition(losses=-entropy_coef * _entropy(inputs, "entropy_bonus"))


def adaptive_entropy_bonus(inputs: LossInputs) -> Addition:
    """-c_i H with the coefficient of each prompt from AdaptiveEntropyCoef, which the trainer puts in entropy_coefs.

    AER-style (arXiv 2510.10959): its formulas could not be read, those of AdaptiveEntropyCoef are this project's.
    """
    coefs = needed(inputs.entropy_coefs, "entropy_coefs", "adaptive_entropy_bonus")
    losses = -coefs.detach() * _entropy(inputs, "adaptive_entropy_bonus")
    return Addition(losses=losses, metrics={"entropy_coef": coefs})


def kl(
    inputs: LossInputs, *, kl_coef: Positive = 0.001, kl_estimator: Literal["k1", "k2", "k3"] = "k3"
) -> Addition:
    """kl_coef times an estimate of the KL to the reference policy, from the sampled token; aggregated as the policy loss.

    With x = ln p - ln p_ref: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (GRPO, arXiv 2402.03300). As values, k1 and k3
    estimate KL(policy || reference) without bias. As losses they differ: the gradient of k1 is 1, which on policy has
    mean 0 and holds nothing back; that of k2 is x, on policy the gradient of KL(policy || reference); that of k3 is
    1 - p_ref / p, on policy the gradient of KL(reference || policy).
    """
    losses = kl_estimate(inputs, kl_estimator, "kl")
    return Addition(losses=kl_coef * losses, metrics={"reference_kl": losses.detach()})


def kl_estimate(inputs: LossInputs, estimator: Literal["k1", "k2", "k3"], user: str) -> Tensor:
    """[T] of the estimators of `kl`, 0 outside the response; beyond the log-ratio clamp without gradient."""
    reference = needed(inputs.reference_logprobs, "reference_logprobs", user)
    x = torch.where(inputs.response_mask, inputs.logprobs - reference, 0.0)
    x = x.clamp(-inputs.log_ratio_clamp, inputs.log_ratio_clamp)
    return {"k1": x, "k2": x.square() / 2, "k3": torch.expm1(-x) + x}[estimator]


def truncated_importance(
    inputs: LossInputs,
    *,
    importance_cap: AboveOne = 2.0,
    importance_level: Literal["token", "sequence"] = "token",
) -> Addition:
    """Weighs the policy loss by min(w, importance_cap), w = q / (probability that the engine reports); TIS.

    Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025. q is the trainer's
    probability before the step's updates: w corrects for an engine that samples with other arithmetic. sequence: w is
    the product over the response (two collectives where it is split over ranks). Additions are not weighed.
    importance_weight and importance_weight_squared: their means give the effective sample size, mean(w)^2 / mean(w^2) of
    the tokens; importance_capped: share of tokens with w above the cap.
    """
    ratio = _importance_ratio(inputs, importance_level, "truncated_importance")
    return _weighed(ratio.clamp(max=importance_cap), ratio > importance_cap)


def masked_importance(
    inputs: LossInputs,
    *,
    importance_cap: AboveOne = 2.0,
    importance_level: Literal["token", "sequence"] = "token",
) -> Addition:
    """As truncated_importance, but a token with w above importance_cap or under its inverse gets weight 0; MIS.

    Its token counts in the mean. importance_capped is the share of such tokens.
    """
    ratio = _importance_ratio(inputs, importance_level, "masked_importance")
    masked = (ratio > importance_cap) | (ratio < 1 / importance_cap)
    return _weighed(torch.where(masked, 0.0, ratio), masked)


def _importance_ratio(inputs: LossInputs, level: Literal["token", "sequence"], user: str) -> Tensor:
    engine = needed(inputs.rollout_logprobs, "rollout_logprobs", user)
    difference = torch.where(inputs.response_mask, inputs.old_logprobs - engine, 0.0)
    if level == "sequence":
        total, _ = response_sums(difference, inputs, f"{user} with importance_level=sequence")
        difference = total.to(difference.dtype)
    return difference.clamp(-inputs.log_ratio_clamp, inputs.log_ratio_clamp).exp()


def _weighed(weights: Tensor, capped: Tensor) -> Addition:
    metrics = {
        "importance_weight": weights,
        "importance_weight_squared": weights.square(),
        "importance_capped": capped,
    }
    return Addition(weights=weights, metrics=metrics)


@dataclass(kw_only=True)
class AdaptiveEntropyCoef:
    """The coefficients c_i of the adaptive entropy bonus, one a prompt, and the state that they come from.

    c_i = alpha max(0, rho - accuracy_i) / rho: prompts that are answered less often than rho are explored more.
    alpha <- clip(alpha + eta (H* - H_k), 0, alpha_max), starting at 0, with H* = tau H_0 and H_0 the entropy of the
    first step. Three parts that arXiv 2510.10959 names in its abstract; formulas and defaults are this project's.
    """

    accuracy_target: Inside = 0.5  # rho
    entropy_target_ratio: Positive = 0.5  # tau
    alpha_step: Positive = 0.001  # eta, per nat
    alpha_max: Positive = 0.01
    alpha: float = field(default=0.0, init=False)
    entropy_start: float | None = field(default=None, init=False)  # H_0

    def coefs(self, entropy: float, accuracies: Tensor) -> Tensor:
        """[P] coefficients of this step, after alpha has moved. entropy: H_k; accuracies: [P] mean over each group."""
        if self.entropy_start is None:
            self.entropy_start = entropy
        gap = self.entropy_target_ratio * self.entropy_start - entropy
        self.alpha = min(max(self.alpha + self.alpha_step * gap, 0.0), self.alpha_max)
        return self.alpha * (self.accuracy_target - accuracies).clamp(min=0) / self.accuracy_target

    def state_dict(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "entropy_start": self.entropy_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha, self.entropy_start = state["alpha"], state["entropy_start"]


def _entropy(inputs: LossInputs, user: str) -> Tensor:
    return torch.where(inputs.response_mask, needed(inputs.entropy, "entropy", user), 0.0)
