"""How long responses are taken to be: exponential with a given mean, cut at the longest."""

from __future__ import annotations

import math
from dataclasses import dataclass

BINS = 64  # of the integral over positions
BISECTIONS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Response lengths of a step; every prompt has its mean length."""

    prompt: float
    mean: float
    longest: float
    scale: float  # of the exponential before the cut; infinite where every response is the longest

    def share_longer(self, position: float) -> float:
        """Of the responses."""
        return math.exp(-position / self.scale)

    @property
    def sequence(self) -> float:
        """Mean positions of prompt and response that the trainer feeds."""
        return self.prompt + self.mean - 1

    @property
    def context(self) -> float:
        """Mean over tokens of the length of their sequence: E[length^2] / E[length]."""
        width = self.longest / BINS
        middles = [(i + 0.5) * width for i in range(BINS)]
        square = sum(2 * x * self.share_longer(x) * width for x in middles)  # E[X^2] of the response
        return (self.prompt**2 + 2 * self.prompt * self.mean + square) / (self.prompt + self.mean)

    def expected_longest(self, count: float) -> float:
        """Of `count` sequences, about."""
        return self.prompt + min(self.longest, self.scale * math.log(max(math.e, count)))


def response_lengths(*, prompt: float, mean: float, longest: float) -> Lengths:
    """mean: of the responses after the cut; at most the longest."""
    if mean >= longest:
        return Lengths(prompt=prompt, mean=longest, longest=longest, scale=math.inf)
    low, high = mean, mean
    while high * (1 - math.exp(-longest / high)) < mean and high < 1e6 * longest:
        high *= 2
    for _ in range(BISECTIONS):
        scale = (low + high) / 2
        low, high = (scale, high) if scale * (1 - math.exp(-longest / scale)) < mean else (low, scale)
    return Lengths(prompt=prompt, mean=mean, longest=longest, scale=high)
