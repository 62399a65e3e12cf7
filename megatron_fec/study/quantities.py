"""Numbers read off the curves of one seed's runs; differences of them are what the verdicts judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_fec.run_log import Row

ENTROPY = "train_rollouts/entropy"
REWARD = "train_rollouts/reward"
EPS_UPPER = "train_optim/eps_upper_mean"
EPS_LOWER = "train_optim/eps_lower_mean"
CLIP_UPPER = "train_optim/clip_fraction_upper"
CLIP_LOWER = "train_optim/clip_fraction_lower"
WEIGHT_UPPER = "train_optim/weight_upper"
PASS_AT = "val_rollouts/pass_at_k/"
PREDICTED = "train_optim/dH/region_"  # and the region
ENTROPY_CHANGE = "exact/entropy_change/"  # and the family of states

Points = list[tuple[float, float]]  # (share of the plan, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A part of the plan, as shares of its steps; the last step belongs to a window that ends at 1."""

    start: float
    end: float

    def holds(self, share: float) -> bool:
        return self.start <= share < self.end or (self.end >= 1 <= share)


START = Window(start=0.0, end=0.05)
EARLY = Window(start=0.1, end=0.25)
PEAK = Window(start=0.25, end=0.5)  # where the paper's ID is highest
MIDDLE = Window(start=0.4, end=0.6)  # where the paper's DID is highest
LATE = Window(start=0.9, end=1.0)
WHOLE = Window(start=0.0, end=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What one run measured."""

    rows: Sequence[Row]
    total_steps: int  # of the plan

    def points(self, metric: str) -> Points:
        """The metric over the share of the plan that had passed; clip_fraction is the sum of both sides."""
        if metric == CLIP_FRACTION:
            return [
                (row["step"] / self.total_steps, row[CLIP_UPPER] + row[CLIP_LOWER])
                for row in self.rows
                if CLIP_UPPER in row
            ]
        return [(row["step"] / self.total_steps, row[metric]) for row in self.rows if metric in row]

    def mean(self, metric: str, window: Window) -> float:
        values = [value for share, value in self.points(metric) if window.holds(share)]
        if not values:
            raise ValueError(f"no value of {metric} between {window.start} and {window.end} of the plan")
        return sum(values) / len(values)

    def keys(self, prefix: str) -> list[int]:
        """The k of pass@k that were measured, in order."""
        found = {key.removeprefix(prefix) for row in self.rows for key in row if key.startswith(prefix)}
        return sorted(int(key) for key in found)


CLIP_FRACTION = "clip_fraction"
Seed = Mapping[str, Curves]  # variant -> its run with this seed


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number of one seed, and the variants whose runs it needs."""

    variants: frozenset[str]
    of: Callable[[Seed], float]

    def __sub__(self, other: Quantity | float) -> Quantity:
        if isinstance(other, Quantity):
            return Quantity(self.variants | other.variants, lambda seed: self.of(seed) - other.of(seed))
        return Quantity(self.variants, lambda seed: self.of(seed) - other)

    def __rsub__(self, other: float) -> Quantity:
        return Quantity(self.variants, lambda seed: other - self.of(seed))

    def __truediv__(self, other: Quantity) -> Quantity:
        return Quantity(self.variants | other.variants, lambda seed: self.of(seed) / other.of(seed))


def mean(variant: str, metric: str, window: Window) -> Quantity:
    """The metric's mean over a part of the plan."""
    return Quantity(frozenset({variant}), lambda seed: seed[variant].mean(metric, window))


def peak(variant: str, metric: str, *, half_width: float = 0.03) -> Quantity:
    """The largest value of the smoothed curve."""

    def value(seed: Seed) -> float:
        points = seed[variant].points(metric)
        return max(smooth_near(points, share, half_width) for share, _ in points)

    return Quantity(frozenset({variant}), value)


def largest(quantities: Sequence[Quantity]) -> Quantity:
    return Quantity(_variants(quantities), lambda seed: max(q.of(seed) for q in quantities))


def smallest(quantities: Sequence[Quantity]) -> Quantity:
    return Quantity(_variants(quantities), lambda seed: min(q.of(seed) for q in quantities))


def pass_at(variant: str, which: str) -> Quantity:
    """pass@k at the evaluation nearest to the middle of the plan; which: `first` k, which is 1, or `last`."""

    def value(seed: Seed) -> float:
        curves = seed[variant]
        k = curves.keys(PASS_AT)[0 if which == "first" else -1]
        return min(curves.points(f"{PASS_AT}{k}"), key=lambda point: abs(point[0] - 0.5))[1]

    return Quantity(frozenset({variant}), value)


def switches(variant: str) -> Quantity:
    """How often a schedule of two modes changed from one to the other."""

    def value(seed: Seed) -> float:
        weights = [weight for _, weight in seed[variant].points(WEIGHT_UPPER)]
        return float(sum(a != b for a, b in pairwise(weights)))

    return Quantity(frozenset({variant}), value)


def clip_fraction_by_mode(variant: str) -> Quantity:
    """Mean clip fraction while a schedule of two modes boosts, over that while it suppresses; 1 without both modes."""

    def value(seed: Seed) -> float:
        boosts = [weight > 0 for _, weight in seed[variant].points(WEIGHT_UPPER)]
        clips = [clip for _, clip in seed[variant].points(CLIP_FRACTION)]
        on = [clip for clip, boost in zip(clips, boosts, strict=True) if boost]
        off = [clip for clip, boost in zip(clips, boosts, strict=True) if not boost]
        return (sum(on) / len(on)) / (sum(off) / len(off)) if on and off else 1.0

    return Quantity(frozenset({variant}), value)


def tracking_error(variant: str, *, end: float) -> Quantity:
    """Mean of |H - H*| / H* over the plan; H* falls from the run's first entropy to `end` times it, by half a cosine."""

    def value(seed: Seed) -> float:
        points = seed[variant].points(ENTROPY)
        errors = [abs(entropy / (points[0][1] * cosine(share, end)) - 1) for share, entropy in points]
        return sum(errors) / len(errors)

    return Quantity(frozenset({variant}), value)


def cosine(share: float, end: float) -> float:
    """Half a period from 1 to `end`."""
    return end + (1 - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def slope_correlation(variant: str, metric: str, *, half_width: float = 0.05) -> Quantity:
    """Correlation over the plan of the metric with the local slope of entropy, a centred difference."""

    def value(seed: Seed) -> float:
        entropy = seed[variant].points(ENTROPY)
        pairs = []
        for share, at in seed[variant].points(metric):
            before, after = (
                value_near(entropy, share - half_width),
                value_near(entropy, share + half_width),
            )
            pairs.append((at, after - before))
        return correlation(pairs)

    return Quantity(frozenset({variant}), value)


def shape_correlation(variant: str, metric: str, reference: Points, *, half_width: float = 0.02) -> Quantity:
    """Correlation of the run's curve with a reference, at the reference's points; scales and offsets do not count."""

    def value(seed: Seed) -> float:
        points = seed[variant].points(metric)
        last = points[-1][0]
        pairs = [
            (smooth_near(points, share, half_width), wanted) for share, wanted in reference if share <= last
        ]
        return correlation(pairs)

    return Quantity(frozenset({variant}), value)


def value_near(points: Points, share: float) -> float:
    return min(points, key=lambda point: abs(point[0] - share))[1]


def smooth_near(points: Points, share: float, half_width: float) -> float:
    """Mean of the values within half_width, or the nearest where there is none."""
    values = [value for at, value in points if abs(at - share) <= half_width]
    return sum(values) / len(values) if values else value_near(points, share)


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's; 0 where one side is constant."""
    n = len(pairs)
    mean_x, mean_y = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
    xy = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    xx, yy = sum((x - mean_x) ** 2 for x, _ in pairs), sum((y - mean_y) ** 2 for _, y in pairs)
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0


def _variants(quantities: Sequence[Quantity]) -> frozenset[str]:
    return frozenset().union(*(q.variants for q in quantities))
