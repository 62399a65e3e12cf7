"""Float64 oracle of the policy losses, thresholds and schedules: one token at a time, in Python floats.

Gradients are written by hand from the cases of the formulas, not by autograd. Imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EPS_STD = 0.2


def upper_line(p: float) -> float:
    """H(p), section C.2."""
    return -0.25 * p + 0.5


def lower_line(p: float) -> float:
    """M(p), section C.2."""
    return -0.13 * p + 0.3


def bounds(p: float, w_upper: float, w_lower: float) -> tuple[float, float]:
    """(eps_lower, eps_upper) of one token."""
    return (
        (1 - w_lower) * EPS_STD + w_lower * lower_line(p),
        (1 - w_upper) * EPS_STD + w_upper * upper_line(p),
    )


def scheduled_bounds(
    name: str, p: float, k: float, total: int, rho: float = 0.5, reading: str = "text"
) -> tuple[float, float]:
    """(eps_lower, eps_upper) as the equations of section 4.2 write them, with the turn at rho * total."""
    turn = rho * total
    if k <= turn:
        lam = 1 - k / turn
        start, end = (upper_line(p), EPS_STD) if name == "id" else (EPS_STD, upper_line(p))
        eps_lower, eps_upper = EPS_STD, lam * start + (1 - lam) * end
    else:
        lam = -(k - turn) / ((1 - rho) * total)
        eps_upper = EPS_STD if name == "id" else upper_line(p)
        if reading == "printed":
            eps_lower = (1 + lam) * lower_line(p) - lam * EPS_STD
        else:
            eps_lower = (1 + lam) * EPS_STD - lam * lower_line(p)
    return eps_lower, eps_upper


def clip_loss(
    logprob: float,
    old: float,
    advantage: float,
    eps_lower: float,
    eps_upper: float,
    dual_clip: float | None = None,
    clamp: float = 20.0,
) -> tuple[float, float]:
    """(loss, d loss / d logprob) of one token under the clipped surrogate, bounds held constant."""
    d = logprob - old
    ratio = math.exp(min(max(d, -clamp), clamp))
    loss = -advantage * ratio
    gradient = -advantage * ratio
    if advantage > 0 and ratio > 1 + eps_upper:
        loss, gradient = -advantage * (1 + eps_upper), 0.0
    if advantage < 0 and ratio < 1 - eps_lower:
        loss, gradient = -advantage * (1 - eps_lower), 0.0
    if dual_clip is not None and advantage < 0 and ratio > dual_clip:
        loss, gradient = -advantage * dual_clip, 0.0
    if abs(d) > clamp:
        gradient = 0.0
    return loss, gradient


def aggregate(
    losses: Sequence[float], mask: Sequence[bool], ids: Sequence[int], how: str, longest: int = 1
) -> tuple[float, int, list[float]]:
    """(sum, count, d sum / d loss of each token); longest is the divisor of seq_mean_token_sum_norm."""
    lengths: dict[int, int] = {}
    for counts, i in zip(mask, ids, strict=True):
        if counts:
            lengths[i] = lengths.get(i, 0) + 1
    total, weights = 0.0, []
    for loss, counts, i in zip(losses, mask, ids, strict=True):
        weight = 0.0
        if counts:
            divisors = {"seq_mean_token_mean": lengths[i], "seq_mean_token_sum_norm": longest}
            weight = 1 / divisors.get(how, 1)
            total += weight * loss
        weights.append(weight)
    return total, sum(mask) if how == "token_mean" else len(lengths), weights


def metrics(
    logprobs: Sequence[float],
    olds: Sequence[float],
    advantages: Sequence[float],
    eps_lowers: Sequence[float],
    eps_uppers: Sequence[float],
    entropies: Sequence[float],
    dual_clip: float | None,
    clamp: float = 20.0,
) -> dict[str, float]:
    """Means over the given tokens, all of them response tokens."""
    sums = {}
    for lp, old, a, low, up, h in zip(
        logprobs, olds, advantages, eps_lowers, eps_uppers, entropies, strict=True
    ):
        d = min(max(lp - old, -clamp), clamp)
        r = math.exp(d)
        token = {
            "entropy": h,
            "eps_upper_mean": up,
            "eps_lower_mean": low,
            "clip_fraction_upper": 1.0 if a > 0 and r > 1 + up else 0.0,
            "clip_fraction_lower": 1.0 if a < 0 and r < 1 - low else 0.0,
            "dual_clip_fraction": 1.0 if dual_clip is not None and a < 0 and r > dual_clip else 0.0,
            "ratio_moved": 1.0 if lp != old else 0.0,
            "log_ratio_abs": abs(lp - old),
            "approx_kl": r - 1 - d,
        }
        for name, value in token.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / len(logprobs) for name, value in sums.items()}
