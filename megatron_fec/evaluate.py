"""mean@k and unbiased pass@k of sampled responses, with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

Z_95 = 1.959963984540054  # the normal distribution has 95 % of its mass within it


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems, and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k={k} must be between 1 and the {num_samples} samples of a prompt. Sample more or lower k."
        )
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit."""
    return [1 << exponent for exponent in range(limit.bit_length())]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value in [0, 1] a problem, with Wilson's interval at the effective number of problems.

    The problems are a draw from all problems of their kind, and their values already hold the noise of the samples. P
    problems whose values vary by s^2 tell as much as n = P m (1 - m) / s^2 yes-or-no answers of mean m; Wilson's
    interval takes that n (Korn and Graubard, Survey Methodology 24, 1998, do so with Clopper and Pearson's). It stays in
    [0, 1] and is not empty where all problems are right or none is, where a bootstrap over problems is; there n = P.
    """
    mean, count = fmean(values), len(values)
    spread = variance(values, mean) if count > 1 else 0.0
    # A mean that is rounded to 1 may have a spread above 0.
    answers = count * mean * (1 - mean) / spread if spread > 0 and 0 < mean < 1 else count
    shrink = 1 + Z_95**2 / answers
    centre = (mean + Z_95**2 / (2 * answers)) / shrink
    half = Z_95 / shrink * math.sqrt(mean * (1 - mean) / answers + (Z_95 / (2 * answers)) ** 2)
    return Estimate(
        value=mean, low=max(0.0, min(mean, centre - half)), high=min(1.0, max(mean, centre + half))
    )


def estimates(rewards: Sequence[Sequence[float]], ks: Sequence[int]) -> dict[str, Estimate]:
    """mean_at_k/N over the N samples of a prompt, and pass_at_k/K for each K of ks.

    rewards: one list a prompt, all of one length N. A response is right when its reward is above 0.
    """
    num_samples = len(rewards[0])
    right = [sum(reward > 0 for reward in group) for group in rewards]
    found = {f"mean_at_k/{num_samples}": estimate([c / num_samples for c in right])}
    for k in ks:
        found[f"pass_at_k/{k}"] = estimate([pass_at_k(num_samples, c, k) for c in right])
    return found


def evaluation_metrics(rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """The values of `estimates`, with the powers of two up to N."""
    found = estimates(rewards, powers_of_two(len(rewards[0])))
    return {name: one.value for name, one in found.items()}
