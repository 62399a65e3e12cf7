"""A schedule that makes the measured entropy follow a target curve: a PI controller over the weights of the lines.

Not in the paper, whose schedules are open loops: they set weights and take the entropy that comes.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

from megatron_fec.algorithm.options import BelowOne, NotNegative, Positive
from megatron_fec.algorithm.schedule_checks import check_entropy, check_state, check_total_steps, require
from megatron_fec.config import ScheduleConfig
from megatron_fec.types import BlendWeights

KEY = "algorithm.schedule.options"
Shape = Literal["cosine", "linear", "constant", "points"]


class EntropyTarget:
    """Weights (u, -u): both lines at once, u > 0 raises entropy, u < 0 lowers it.

    With H the measured entropy and H* the target of this step:

        e = (H* - H) / H*, moved towards 0 by the deadband
        u = clip(proportional_gain e + I, +-weight_limit),    I <- I + integral_gain e

    Anti-windup: I stays as it is while u would be at its limit and e pushes it further. Weights outside [0, 1]
    extrapolate the lines, and clip_bounds floors the distances.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        *,
        target_shape: Shape,
        target_end: Positive | None = None,  # cosine, linear: the target at T over the one at step 0
        target_points: list[list[float]] | None = None,  # [[step / T, target over the one at step 0], ...]
        target_start: Positive | None = None,  # nats at step 0; null measures it
        proportional_gain: NotNegative = 10.0,
        integral_gain: NotNegative = 1.0,
        weight_limit: Positive = 3.0,
        deadband: BelowOne = 0.0,  # relative errors up to this one count as 0
        entropy_ema: BelowOne = 0.0,  # H <- ema * H + (1 - ema) * measured; 0 is off
    ) -> None:
        check_total_steps(config.total_steps)
        _check_curve(target_shape, target_end, target_points)
        require(
            proportional_gain + integral_gain > 0,
            f"{KEY}.proportional_gain={proportional_gain} and {KEY}.integral_gain={integral_gain} must not both be 0: "
            "the weights would stay 0. Use 10 and 1.",
        )
        self._total_steps = config.total_steps
        self._points = _curve(target_shape, target_end, target_points)
        self._is_cosine = target_shape == "cosine"
        self._configured_start = target_start
        self._gains = proportional_gain, integral_gain
        self._limit = weight_limit
        self._deadband = deadband
        self._ema = entropy_ema
        self._start = target_start
        self._entropy: float | None = None  # smoothed
        self._integral = 0.0
        self._metrics: dict[str, float] = {}

    def weights(self, step: int, entropy: float) -> BlendWeights:
        check_entropy(entropy, step)
        self._entropy = (
            entropy if self._entropy is None else self._ema * self._entropy + (1 - self._ema) * entropy
        )
        if self._start is None:
            self._start = self._entropy
        if self._start <= 0:
            raise RuntimeError(
                f"entropy={entropy} at step {step} must be greater than 0: the target is relative to it. "
                f"Set {KEY}.target_start."
            )
        target = self._start * self._ratio(step)
        error = (target - self._entropy) / target
        u = self._step_controller(math.copysign(max(abs(error) - self._deadband, 0.0), error))
        self._metrics |= {"target_entropy": target, "target_error": error}
        return BlendWeights(upper=u, lower=-u)

    def metrics(self) -> dict[str, float]:
        """Target in nats, relative error, integral, and 1 where the controller asked for more than its limit."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start, "entropy": self._entropy, "integral": self._integral}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a run; a target_start in the configuration goes before the one that was measured."""
        check_state(state, self.state_dict())
        self._start = state["start"] if self._configured_start is None else self._configured_start
        self._entropy = state["entropy"]
        self._integral = state["integral"]

    def _step_controller(self, error: float) -> float:
        """u of this step."""
        proportional, gain = self._gains
        integral = self._integral + gain * error
        wanted = proportional * error + integral
        is_saturated = abs(wanted) >= self._limit
        if not is_saturated or wanted * error < 0:
            self._integral = integral
        self._metrics = {"target_integral": self._integral, "is_saturated": float(is_saturated)}
        return min(max(proportional * error + self._integral, -self._limit), self._limit)

    def _ratio(self, step: int) -> float:
        """The target over its start; held before the first point and after the last."""
        at = min(max(step / self._total_steps, 0.0), 1.0)
        (left, before), *rest = self._points
        if at <= left:
            return before
        for right, after in rest:
            if at <= right:
                share = (at - left) / (right - left)
                share = (1 - math.cos(math.pi * share)) / 2 if self._is_cosine else share
                return before + share * (after - before)
            left, before = right, after
        return before


def _curve(shape: Shape, end: float | None, points: list[list[float]] | None) -> list[tuple[float, float]]:
    """(step / T, ratio) of the corners; between them the curve is a line or, for cosine, half a period."""
    if points is not None:
        return [(at, ratio) for at, ratio in points]
    return [(0.0, 1.0), (1.0, 1.0 if end is None else end)]


def _check_curve(shape: Shape, end: float | None, points: list[list[float]] | None) -> None:
    for name, value, shapes, example in (
        ("target_end", end, ("cosine", "linear"), "0.5 for half of the first entropy"),
        ("target_points", points, ("points",), "[[0, 1], [0.5, 1.2], [1, 0.5]]"),
    ):
        if shape in shapes:
            require(
                value is not None,
                f"{KEY}.{name} is required by target_shape={shape}. Set it, such as {example}.",
            )
        else:
            require(
                value is None,
                f"{KEY}.{name}={value} is not read by target_shape={shape}. Remove it, or use {' or '.join(shapes)}.",
            )
    if points is not None:
        are_pairs = bool(points) and all(len(point) == 2 for point in points)
        steps = [point[0] for point in points] if are_pairs else []
        require(
            are_pairs
            and all(0 <= step <= 1 for step in steps)
            and all(a < b for a, b in pairwise(steps))
            and all(ratio > 0 for _, ratio in points),
            f"{KEY}.target_points={points} must be pairs [step / total_steps, ratio] with steps that rise inside [0, 1] "
            "and ratios greater than 0, such as [[0, 1], [0.5, 1.2], [1, 0.5]].",
        )
