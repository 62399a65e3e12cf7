"""Entropy schedules of arXiv 2602.09782, section 4.2: (step, measured entropy) -> weights of the lines.

Where the paper leaves a choice open or contradicts itself, the choice is a field of ScheduleConfig.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Protocol

from megatron_fec.config import ConfigError, ScheduleConfig
from megatron_fec.types import BlendWeights

STATIC_WEIGHTS = {
    "grpo": BlendWeights(upper=0.0, lower=0.0),
    "static": BlendWeights(upper=0.0, lower=0.0),  # Clip-Higher and its kind: other numbers in ThresholdLines
    "dynamic_upper": BlendWeights(upper=1.0, lower=0.0),
    "dynamic_lower": BlendWeights(upper=0.0, lower=1.0),
}
BOOST = BlendWeights(upper=1.0, lower=0.0)
SUPPRESS = BlendWeights(upper=0.0, lower=1.0)


class Schedule(Protocol):
    """A plan for the two lines. Every rank must call it with the same float and gets the same weights."""

    def __init__(self, config: ScheduleConfig) -> None: ...

    def weights(self, step: int, entropy: float) -> BlendWeights:
        """Weights of one step; called once a step, before its first update.

        step: 0-based. entropy: token mean over the response tokens of the policy that sampled this step.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON types."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Static:
    """The same weights at every step."""

    def __init__(self, config: ScheduleConfig) -> None:
        _require(
            config.name in STATIC_WEIGHTS,
            f"algorithm.schedule.name={config.name} must be one of {', '.join(STATIC_WEIGHTS)} for constant "
            "weights. Use one of them, or build_schedule.",
        )
        self._weights = STATIC_WEIGHTS[config.name]

    def weights(self, step: int, entropy: float) -> BlendWeights:
        return self._weights

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_state(state, self.state_dict())


class IncreaseDecrease:
    """ID: the upper line is on at first and fades out until the turn; the lower line is used after it."""

    def __init__(self, config: ScheduleConfig) -> None:
        _check_total_steps(config)
        _check_phases(config)
        self._config = config

    def weights(self, step: int, entropy: float) -> BlendWeights:
        phase = _phase(step, self._config)
        return BlendWeights(upper=max(phase, 0.0), lower=_phase_two_lower(phase, self._config))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_state(state, self.state_dict())


class DecreaseIncreaseDecrease:
    """DID: the upper line fades in until the turn and stays; the lower line is used after the turn."""

    def __init__(self, config: ScheduleConfig) -> None:
        _check_total_steps(config)
        _check_phases(config)
        self._config = config

    def weights(self, step: int, entropy: float) -> BlendWeights:
        phase = _phase(step, self._config)
        return BlendWeights(upper=1.0 - max(phase, 0.0), lower=_phase_two_lower(phase, self._config))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_state(state, self.state_dict())


class OscillatoryDecay:
    """OD: boosts entropy from H_min up to a ceiling that falls from H_init to H_min, then suppresses it.

    Between the two thresholds the last mode is held. The first mode is to suppress: at step 0 the entropy
    equals the ceiling, and rounding must not decide. H_init, unless configured, is the entropy of the first
    call; a checkpoint carries it, so that a resumed run does not measure it again.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        _check_total_steps(config)
        _check_oscillation(config)
        self._config = config
        self._is_boosting = False
        self._h_init = config.h_init
        self._entropy: float | None = None  # smoothed

    def weights(self, step: int, entropy: float) -> BlendWeights:
        if not math.isfinite(entropy):
            raise RuntimeError(
                f"entropy={entropy} at step {step} must be finite. Look for the NaN in the log-probs."
            )
        ema = self._config.entropy_ema
        self._entropy = entropy if self._entropy is None else ema * self._entropy + (1 - ema) * entropy
        if self._h_init is None:
            self._h_init = self._entropy
            _check_h_min(self._config.h_min, self._h_init, "the entropy measured at the first step")
        h_min = (
            self._config.h_min if self._config.h_min is not None else self._config.h_min_ratio * self._h_init
        )
        ceiling = h_min + (self._h_init - h_min) * max(0.0, 1 - step / self._config.total_steps)
        if self._entropy <= h_min:
            self._is_boosting = True
        elif self._entropy > ceiling:
            self._is_boosting = False
        return BOOST if self._is_boosting else SUPPRESS

    def state_dict(self) -> dict[str, Any]:
        return {"is_boosting": self._is_boosting, "h_init": self._h_init, "entropy": self._entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a run; an h_init in the configuration goes before the one that was measured."""
        _check_state(state, self.state_dict())
        self._is_boosting = state["is_boosting"]
        self._h_init = state["h_init"] if self._config.h_init is None else self._config.h_init
        self._entropy = state["entropy"]


SCHEDULES: dict[str, type[Schedule]] = {
    "grpo": Static,
    "static": Static,
    "dynamic_upper": Static,
    "dynamic_lower": Static,
    "id": IncreaseDecrease,
    "did": DecreaseIncreaseDecrease,
    "od": OscillatoryDecay,
}


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that `config.name` asks for."""
    _require(
        config.name in SCHEDULES,
        f"algorithm.schedule.name={config.name} must be one of {', '.join(SCHEDULES)}. Use one of these.",
    )
    return SCHEDULES[config.name](config)


def _phase(step: int, config: ScheduleConfig) -> float:
    """lambda(k): 1 at step 0, 0 at the turn k = phase_ratio T, -1 from T on; 1 - 2k/T for the ratio 0.5.

    The turn itself belongs to phase I, as in the formulas. Fractions, because in floats 0.29 * 100 < 29 and
    the turn of that plan would be missed.
    """
    total = Fraction(config.total_steps)
    turn = Fraction(str(config.phase_ratio)) * total
    k = min(max(Fraction(step), Fraction(0)), total)
    return float(1 - k / turn if k <= turn else (turn - k) / (total - turn))


def _phase_two_lower(phase: float, config: ScheduleConfig) -> float:
    """Weight of the lower line, 0 in phase I.

    Phase II has two readings. `text` goes from eps_std to the line, as the paper says. `printed` goes from
    the line to eps_std, as its formula (1 + lambda) M(p) - lambda eps_std does; it jumps at the turn.
    """
    if phase >= 0:
        return 0.0
    return 1.0 + phase if config.lower_schedule == "printed" else -phase


def _require(is_met: bool, message: str) -> None:
    if not is_met:
        raise ConfigError(message)


def _check_total_steps(config: ScheduleConfig) -> None:
    _require(
        isinstance(config.total_steps, int) and config.total_steps >= 1,
        f"algorithm.schedule.total_steps={config.total_steps} must be an integer of at least 1. "
        "Set it to the number of steps that the plan spans.",
    )


def _check_phases(config: ScheduleConfig) -> None:
    _require(
        0 < config.phase_ratio < 1,
        f"algorithm.schedule.phase_ratio={config.phase_ratio} must be between 0 and 1. The paper uses 0.5.",
    )
    _require(
        config.lower_schedule in ("text", "printed"),
        f"algorithm.schedule.lower_schedule={config.lower_schedule} must be text or printed for "
        f"{config.name}: the paper's formula of phase II contradicts its text. Use text for a plan without a jump "
        "(docs/equations.md).",
    )


def _check_oscillation(config: ScheduleConfig) -> None:
    _require(
        config.h_init is None or 0 < config.h_init < math.inf,
        f"algorithm.schedule.h_init={config.h_init} must be greater than 0. Use null to measure it.",
    )
    _require(
        0 < config.h_min_ratio <= 1,
        f"algorithm.schedule.h_min_ratio={config.h_min_ratio} must be in (0, 1]. The paper uses 0.2.",
    )
    _require(
        config.h_min is None or config.h_min > 0,
        f"algorithm.schedule.h_min={config.h_min} must be greater than 0. Use null for h_min_ratio * h_init.",
    )
    _require(
        0 <= config.entropy_ema < 1,
        f"algorithm.schedule.entropy_ema={config.entropy_ema} must be in [0, 1). Use 0 for no smoothing.",
    )
    if config.h_init is not None:
        _check_h_min(config.h_min, config.h_init, "algorithm.schedule.h_init")


def _check_h_min(h_min: float | None, h_init: float, source: str) -> None:
    _require(
        h_min is None or h_min <= h_init,
        f"algorithm.schedule.h_min={h_min} must be at most {h_init:g}, {source}: entropy oscillates "
        "between the two. Lower h_min or set a larger algorithm.schedule.h_init.",
    )


def _check_state(state: dict[str, Any], own: dict[str, Any]) -> None:
    _require(
        state.keys() == own.keys(),
        f"the checkpoint's schedule state has keys {sorted(state)}, and algorithm.schedule.name needs "
        f"{sorted(own)}: it was saved under another schedule. Resume with that schedule, or use a new "
        "trainer.run_dir.",
    )
