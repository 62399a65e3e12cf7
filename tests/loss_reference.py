"""Float64 oracle of the policy losses and additions: one token at a time, in Python floats, gradients by hand.

Beside reference.py, which has the clipped surrogate and the aggregations. Imports nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import reference

CLAMP = 20.0
Pair = tuple[float, float]  # loss, d loss / d logprob


@dataclass(frozen=True, kw_only=True)
class Token:
    """What a loss may look at."""

    lp: float
    old: float
    a: float
    low: float  # distances of the bounds
    up: float
    h: float
    counts: bool  # response_mask
    sequence: int
    alignment: float = 0.0
    engine: float = 0.0
    anchor: float = 0.0  # log-prob of the reference policy

    @property
    def d(self) -> float:
        return min(max(self.lp - self.old, -CLAMP), CLAMP)

    @property
    def r(self) -> float:
        return math.exp(self.d)

    @property
    def moves(self) -> float:
        """d d / d lp."""
        return 1.0 if abs(self.lp - self.old) <= CLAMP else 0.0

    @property
    def clipped_upper(self) -> bool:
        return self.a > 0 and self.r > 1 + self.up

    @property
    def clipped_lower(self) -> bool:
        return self.a < 0 and self.r < 1 - self.low


def clip(t: Token, low: float, up: float, c: float | None) -> Pair:
    return reference.clip_loss(t.lp, t.old, t.a, low, up, c)


def reinforce(t: Token) -> Pair:
    return -t.a * t.lp, -t.a


def sapo(t: Token, tau_positive: float, tau_negative: float) -> Pair:
    tau = tau_positive if t.a > 0 else tau_negative
    x = tau * (t.r - 1)
    g = 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
    fading = 1 / (2 + 2 * math.cosh(x)) if abs(x) < 700 else 0.0  # g (1 - g)
    return -t.a * g * 4 / tau, -t.a * 4 * fading * t.r * t.moves


def cispo(t: Token, lowest: float, highest: float) -> Pair:
    weight = min(max(t.r, lowest), highest)
    return -weight * t.a * t.lp, -weight * t.a


def ce_gppo(t: Token, b1: float, b2: float, c: float | None) -> Pair:
    factor, slope = t.r, t.r * t.moves
    if t.clipped_lower:
        factor = b1 * (1 - t.low)
        slope = factor * t.moves
    if t.clipped_upper:
        factor = b2 * (1 + t.up)
        slope = factor * t.moves
    if c is not None and t.a < 0 and t.r > c:
        factor, slope = c, 0.0
    return -t.a * factor, -t.a * slope


def dcpo(t: Token, eps_low: float, eps_high: float, cap: float, c: float | None) -> Pair:
    q = math.exp(t.old)
    low = 0.5 + 0.5 * math.sqrt(max(1 - 4 * eps_low / q, 0.0))
    high = min(0.5 + 0.5 * math.sqrt(1 + 4 * eps_high / q), cap)
    return clip(t, 1 - low, high - 1, c)


def gspo(tokens: Sequence[Token], low: float, up: float) -> list[Pair]:
    """The token form; a sequence is all tokens of one number that count."""
    result = []
    for t in tokens:
        own = [o.lp - o.old for o in tokens if o.counts and o.sequence == t.sequence]
        log_s = math.fsum(own) / len(own) if own else 0.0
        s, slope = math.exp(min(log_s, 10.0)), 1.0 if log_s <= 10 else 0.0
        loss, gradient = -t.a * s, -t.a * s * slope
        if t.a > 0 and s > 1 + up:
            loss, gradient = -t.a * (1 + up), 0.0
        if t.a < 0 and s < 1 - low:
            loss, gradient = -t.a * (1 - low), 0.0
        result.append((loss, gradient))
    return result


def region(t: Token, name: str, mode: str) -> tuple[Pair, bool]:
    """((loss, gradient), whether the token is inside), from the table of the four regions."""
    p = math.exp(t.lp)
    kind = p > 0.7 if name in ("E1", "E3") else p <= 0.3
    is_side = (t.a > 0 and t.r > 1) if name in ("E1", "E2") else (t.a < 0 and t.r < 1)
    inside = is_side and kind and 0.7 < t.r < 1.3
    if not is_side:
        return clip(t, t.low, t.up, None), inside
    if mode == "only":
        keep = inside
        reach = 0.3 if kind else 1e-5
    else:
        reach = 0.3 if kind else (t.up if t.a > 0 else t.low)
        keep = t.r <= 1 + reach if t.a > 0 else t.r >= 1 - reach
    if keep:
        return (-t.a * t.r, -t.a * t.r * t.moves), inside
    return (-t.a * (1 + reach if t.a > 0 else 1 - reach), 0.0), inside


def covariances(tokens: Sequence[Token]) -> list[float]:
    mean_a = math.fsum(t.a for t in tokens) / len(tokens)
    mean_lp = math.fsum(t.lp for t in tokens) / len(tokens)
    return [(t.a - mean_a) * (t.lp - mean_lp) for t in tokens]


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between neighbours."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    below = min(math.floor(rank), len(ordered) - 2)
    if below < 0:
        return ordered[0]
    return ordered[below] + (rank - below) * (ordered[below + 1] - ordered[below])


def kl_cov(t: Token, chosen: bool, coef: float) -> Pair:
    x = t.lp - t.old
    sign = (x > 0) - (x < 0)
    penalty, slope = (coef * abs(x), coef * sign) if chosen else (0.0, 0.0)
    return -t.a * t.r + penalty, -t.a * t.r * t.moves + slope


def steer_weights(tokens: Sequence[Token], form: str, how: str, least: float, most: float) -> list[float]:
    changes = []
    for t in tokens:
        p = math.exp(t.lp)
        if form == "exact":
            omega = t.a * t.r * t.alignment
        elif form == "paper":
            omega = t.a * t.r * (1 - p) ** 2 * (t.lp + t.h)
        else:
            omega = t.a * t.r * (1 - p) * (t.lp + t.h)
        changes.append(abs(omega))
    if how == "exp":
        kappa = -math.log(least) / max(*changes, 0.02)
        return [min(max(math.exp(-kappa * x), least), 1.0) for x in changes]
    width = max(changes) - min(changes)
    if width == 0:
        return [(least + most) / 2] * len(changes)
    return [most - (most - least) * (x - min(changes)) / width for x in changes]


def kl(t: Token, estimator: str) -> Pair:
    x = min(max(t.lp - t.anchor, -CLAMP), CLAMP)
    moves = 1.0 if abs(t.lp - t.anchor) <= CLAMP else 0.0
    if estimator == "k1":
        return x, moves
    if estimator == "k2":
        return x * x / 2, x * moves
    return math.exp(-x) - 1 + x, (1 - math.exp(-x)) * moves


def importance(t: Token, tokens: Sequence[Token], level: str) -> float:
    own = [t] if level == "token" else [o for o in tokens if o.counts and o.sequence == t.sequence]
    return math.exp(min(max(math.fsum(o.old - o.engine for o in own), -CLAMP), CLAMP))
