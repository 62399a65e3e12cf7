"""Float64 oracle of advantages, reward shaping and the entropy controller: one number at a time, in Python floats.

Imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Rows = Sequence[Sequence[float]]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float:
    """The unbiased one."""
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / (len(values) - 1))


def grpo(rewards: Rows, delta: float) -> list[list[float]]:
    return [[(r - mean(group)) / (std(group) + delta) for r in group] for group in rewards]


def dr_grpo(rewards: Rows) -> list[list[float]]:
    return [[r - mean(group) for r in group] for group in rewards]


def rloo(rewards: Rows) -> list[list[float]]:
    """Each reward against the mean of all but itself."""
    return [
        [r - mean([other for j, other in enumerate(group) if j != i]) for i, r in enumerate(group)]
        for group in rewards
    ]


def reinforce_pp(rewards: Rows, baseline: str, delta: float) -> list[list[float]]:
    flat = [r for group in rewards for r in group]
    if baseline == "batch":
        return [[(r - mean(flat)) / (std(flat) + delta) for r in group] for group in rewards]
    centred = dr_grpo(rewards)
    spread = std([r for group in centred for r in group])
    return [[r / (spread + delta) for r in group] for group in centred]


def quantile(values: Sequence[float], k: float, method: str) -> float:
    ordered = sorted(values)
    if method == "inverted_cdf":
        for value in ordered:  # the least value whose share of values at most as large reaches k
            if sum(v <= value for v in ordered) / len(ordered) >= k:
                return value
    at = k * (len(ordered) - 1)
    left = int(at)
    right = min(left + 1, len(ordered) - 1)
    return ordered[left] * (1 - (at - left)) + ordered[right] * (at - left)


def qae(rewards: Rows, k: float, method: str, delta: float) -> list[list[float]]:
    return [[(r - quantile(group, k, method)) / (std(group) + delta) for r in group] for group in rewards]


def dcpo(visits: Sequence[Sequence[float]], delta: float) -> list[float]:
    """Advantages of the last of a prompt's visits."""
    group, i = visits[-1], len(visits)
    everything = [r for visit in visits for r in visit]
    result = []
    for r in group:
        new = (r - mean(group)) / (std(group) + delta)
        total = (r - mean(everything)) / (std(everything) + delta)
        smooth_new = (i - 1) / i * new + 1 / i * total
        smooth_total = 1 / i * new + (i - 1) / i * total
        result.append(smooth_new if abs(smooth_new) < abs(smooth_total) else smooth_total)
    return result


def overlong(reward: float, length: int, longest: int, buffer: int, penalty: float) -> float:
    """R + penalty * R_length, with the three cases of DAPO's eq. (13)."""
    if length <= longest - buffer:
        shaped = 0.0
    elif length <= longest:
        shaped = ((longest - buffer) - length) / buffer
    else:
        shaped = -1.0
    return reward + penalty * shaped


def target_ratio(shape: str, x: float, end: float = 1.0, points: Rows = ()) -> float:
    """The target over the one at step 0, at x = step / T."""
    x = min(x, 1.0)
    if shape == "cosine":
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * x))
    if shape == "linear":
        return 1 + (end - 1) * x
    if shape == "constant":
        return 1.0
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def controller(
    errors: Sequence[float], kp: float, ki: float, limit: float, deadband: float = 0.0
) -> list[tuple[float, float, bool]]:
    """(u, integral, is saturated) of each step, from the relative errors (H* - H) / H*."""
    integral, result = 0.0, []
    for raw in errors:
        e = 0.0 if abs(raw) <= deadband else (raw - deadband if raw > 0 else raw + deadband)
        wanted = kp * e + integral + ki * e
        is_saturated = wanted >= limit or wanted <= -limit
        pushes_out = (wanted >= limit and e >= 0) or (wanted <= -limit and e <= 0)
        if not pushes_out:
            integral = integral + ki * e
        u = kp * e + integral
        result.append((limit if u > limit else -limit if u < -limit else u, integral, is_saturated))
    return result
