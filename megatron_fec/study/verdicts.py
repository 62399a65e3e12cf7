"""What the seeds say about a claim: mean, sd, a t-test and its interval, and whether the claim reproduces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95  # of the confidence interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A claim is put as a number per seed that is above 0 when it holds, mostly the difference of two paired runs."""

    values: tuple[float, ...]  # one a seed
    mean: float
    sd: float | None  # unbiased; None with one seed, as all below
    interval: tuple[float, float] | None  # of the mean, two-sided, LEVEL
    t: float | None  # None also where all seeds agree exactly
    p: float | None  # two-sided, that the mean is 0
    reproduces: str  # yes | no | unclear


def judge(values: Sequence[float]) -> Verdict:
    """The one-sample (for differences: paired) t-test over seeds.

    yes: the interval lies above 0. no: below. unclear: it holds 0, or there is only one seed.
    """
    n = len(values)
    assert n > 0 and all(math.isfinite(value) for value in values), f"values {values} of a claim"
    mean = sum(values) / n
    if n == 1:
        return Verdict(
            values=tuple(values), mean=mean, sd=None, interval=None, t=None, p=None, reproduces="unclear"
        )
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    error = sd / math.sqrt(n)
    half = t_quantile((1 + LEVEL) / 2, n - 1) * error
    t = mean / error if error else None
    low, high = mean - half, mean + half
    return Verdict(
        values=tuple(values),
        mean=mean,
        sd=sd,
        interval=(low, high),
        t=t,
        p=None if t is None else 2 * (1 - t_cdf(abs(t), n - 1)),
        reproduces="yes" if low > 0 else "no" if high < 0 else "unclear",
    )


def t_cdf(t: float, df: int) -> float:
    """Student's distribution function for whole df, the finite sums 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    assert df >= 1
    angle = math.atan(t / math.sqrt(df))
    is_odd = df % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for k in range(1 if is_odd else 0, df - 1, 2):  # the exponent of the cosine in each term
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    centre = math.sin(angle) * total
    return 0.5 + ((angle + centre) / math.pi if is_odd else centre / 2)


def t_quantile(probability: float, df: int) -> float:
    """The t whose distribution function is `probability`, by bisection to the last bits."""
    assert 0.5 <= probability < 1
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return (low + high) / 2
