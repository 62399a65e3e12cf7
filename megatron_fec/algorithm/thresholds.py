"""Clip distances that depend on the probability of each token, sections 4.1 and C.2 of arXiv 2602.09782."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_fec.types import BlendWeights, ClipBounds

if TYPE_CHECKING:
    from megatron_fec.config import ThresholdsConfig

__all__ = ["EPS_FLOOR", "BlendWeights", "ClipBounds", "ThresholdLines", "clip_bounds", "threshold_lines"]

EPS_FLOOR = (
    0.02  # under extrapolating weights; at a distance of 0 every token that moves would lose its gradient
)


@dataclass(frozen=True, kw_only=True)
class ThresholdLines:
    """The static clip distance and the two lines over p that may replace it, as (slope, intercept)."""

    eps_std: float = 0.2
    upper: tuple[float, float] = (-0.25, 0.5)  # H(p)
    lower: tuple[float, float] = (-0.13, 0.3)  # M(p)


def threshold_lines(settings: ThresholdsConfig) -> ThresholdLines:
    """The lines as a configuration has them."""
    (a, b), (c, d) = settings.upper, settings.lower
    return ThresholdLines(eps_std=settings.eps_std, upper=(a, b), lower=(c, d))


def clip_bounds(probs: Tensor, weights: BlendWeights, *, lines: ThresholdLines) -> ClipBounds:
    """Clip distances eps_std + w (line(p) - eps_std) of every token; weights (0, 0) are GRPO.

    probs: [T] probability of the sampled token under the current policy, not the old one; detached here, since
    a bound that carries a gradient would give one to clipped tokens (docs/equations.md).
    Returns [T] tensors in the dtype of probs. Weights outside [0, 1] extrapolate; the result is then floored.
    """
    probs = probs.detach()
    return ClipBounds(
        eps_lower=_blend(probs, weights.lower, lines.lower, lines.eps_std),
        eps_upper=_blend(probs, weights.upper, lines.upper, lines.eps_std),
    )


def _blend(probs: Tensor, weight: float, line: tuple[float, float], eps_std: float) -> Tensor:
    slope, intercept = line
    eps = eps_std + weight * (slope * probs + intercept - eps_std)
    # Between the ends nothing is floored, so that a line below the floor means what its user wrote.
    return eps if 0 <= weight <= 1 else eps.clamp(min=EPS_FLOOR)
