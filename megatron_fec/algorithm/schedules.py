"""Entropy schedules of arXiv 2602.09782, section 4.2: (step, measured entropy) -> weights of the lines.

Where the paper leaves a choice open or contradicts itself, the choice is an option (algorithm.schedule.options), which
is a keyword argument of the schedule's constructor.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any, Literal, Protocol

from megatron_fec.algorithm.options import BelowOne, Inside, Positive, UpToOne, check_options, choose
from megatron_fec.algorithm.schedule_checks import check_entropy, check_state, check_total_steps, require
from megatron_fec.algorithm.target import EntropyTarget
from megatron_fec.config import ScheduleConfig
from megatron_fec.types import BlendWeights

STATIC_WEIGHTS = {
    "grpo": BlendWeights(upper=0.0, lower=0.0),
    "static": BlendWeights(upper=0.0, lower=0.0),  # Clip-Higher and its kind: other numbers in ThresholdLines
    "dynamic_upper": BlendWeights(upper=1.0, lower=0.0),
    "dynamic_lower": BlendWeights(upper=0.0, lower=1.0),
}
BOOST = BlendWeights(upper=1.0, lower=0.0)
SUPPRESS = BlendWeights(upper=0.0, lower=1.0)
LowerSchedule = Literal[
    "text", "printed"
]  # two readings of phase II, which the paper's formula and text give


class Schedule(Protocol):
    """A plan for the two lines. Every rank must call it with the same float and gets the same weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...  # (config: ScheduleConfig, *, options)

    def weights(self, step: int, entropy: float) -> BlendWeights:
        """Weights of one step; called once a step, before its first update.

        step: 0-based. entropy: token mean over the response tokens of the policy that sampled this step.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What the last call of weights() decided by, for the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON types."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Static:
    """The same weights at every step."""

    def __init__(self, config: ScheduleConfig) -> None:
        require(
            config.name in STATIC_WEIGHTS,
            f"algorithm.schedule.name={config.name} must be one of {', '.join(STATIC_WEIGHTS)} for constant "
            "weights. Use one of them, or build_schedule.",
        )
        self._weights = STATIC_WEIGHTS[config.name]

    def weights(self, step: int, entropy: float) -> BlendWeights:
        return self._weights

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self.state_dict())


class IncreaseDecrease:
    """ID: the upper line is on at first and fades out until the turn; the lower line is used after it."""

    def __init__(
        self, config: ScheduleConfig, *, lower_schedule: LowerSchedule, phase_ratio: Inside = 0.5
    ) -> None:
        check_total_steps(config.total_steps)
        self._phase = partial(_phase, total_steps=config.total_steps, phase_ratio=phase_ratio)
        self._lower_schedule: LowerSchedule = lower_schedule

    def weights(self, step: int, entropy: float) -> BlendWeights:
        phase = self._phase(step)
        return BlendWeights(upper=max(phase, 0.0), lower=_phase_two_lower(phase, self._lower_schedule))

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self.state_dict())


class DecreaseIncreaseDecrease:
    """DID: the upper line fades in until the turn and stays; the lower line is used after the turn."""

    def __init__(
        self, config: ScheduleConfig, *, lower_schedule: LowerSchedule, phase_ratio: Inside = 0.5
    ) -> None:
        check_total_steps(config.total_steps)
        self._phase = partial(_phase, total_steps=config.total_steps, phase_ratio=phase_ratio)
        self._lower_schedule: LowerSchedule = lower_schedule

    def weights(self, step: int, entropy: float) -> BlendWeights:
        phase = self._phase(step)
        return BlendWeights(upper=1.0 - max(phase, 0.0), lower=_phase_two_lower(phase, self._lower_schedule))

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self.state_dict())


class OscillatoryDecay:
    """OD: boosts entropy from H_min up to a ceiling that falls from H_init to H_min, then suppresses it.

    Between the two thresholds the last mode is held. The first mode is to suppress: at step 0 the entropy
    equals the ceiling, and rounding must not decide. H_init, unless configured, is the entropy of the first
    call; a checkpoint carries it, so that a resumed run does not measure it again.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        *,
        h_init: Positive | None = None,  # entropy at the start; null measures it at step 0
        h_min_ratio: UpToOne = 0.2,  # H_min = h_min_ratio * H_init
        h_min: Positive | None = None,  # replaces h_min_ratio * H_init
        entropy_ema: BelowOne = 0.0,  # H <- ema * H + (1 - ema) * measured; 0 is off
    ) -> None:
        check_total_steps(config.total_steps)
        if h_init is not None:
            _check_h_min(h_min, h_init, "algorithm.schedule.options.h_init")
        self._total_steps = config.total_steps
        self._configured_h_init = h_init
        self._h_min_ratio = h_min_ratio
        self._h_min = h_min
        self._ema = entropy_ema
        self._is_boosting = False
        self._h_init = h_init
        self._entropy: float | None = None  # smoothed

    def weights(self, step: int, entropy: float) -> BlendWeights:
        check_entropy(entropy, step)
        self._entropy = (
            entropy if self._entropy is None else self._ema * self._entropy + (1 - self._ema) * entropy
        )
        if self._h_init is None:
            self._h_init = self._entropy
            _check_h_min(self._h_min, self._h_init, "the entropy measured at the first step")
        h_min = self._h_min if self._h_min is not None else self._h_min_ratio * self._h_init
        ceiling = h_min + (self._h_init - h_min) * max(0.0, 1 - step / self._total_steps)
        if self._entropy <= h_min:
            self._is_boosting = True
        elif self._entropy > ceiling:
            self._is_boosting = False
        return BOOST if self._is_boosting else SUPPRESS

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"is_boosting": self._is_boosting, "h_init": self._h_init, "entropy": self._entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a run; an h_init in the configuration goes before the one that was measured."""
        check_state(state, self.state_dict())
        self._is_boosting = state["is_boosting"]
        self._h_init = state["h_init"] if self._configured_h_init is None else self._configured_h_init
        self._entropy = state["entropy"]


SCHEDULES: dict[str, type[Schedule]] = {
    "grpo": Static,
    "static": Static,
    "dynamic_upper": Static,
    "dynamic_lower": Static,
    "id": IncreaseDecrease,
    "did": DecreaseIncreaseDecrease,
    "od": OscillatoryDecay,
    "target": EntropyTarget,
}


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that `config.name` asks for; a setting that it does not read is an error."""
    schedule = choose(SCHEDULES, config.name, key="algorithm.schedule.name")
    check_options({config.name: schedule.__init__}, config.options, key="algorithm.schedule.options")
    return schedule(config, **config.options)


def _phase(step: int, *, total_steps: int, phase_ratio: float) -> float:
    """lambda(k): 1 at step 0, 0 at the turn k = phase_ratio T, -1 from T on; 1 - 2k/T for the ratio 0.5.

    The turn itself belongs to phase I, as in the formulas. Fractions, because in floats 0.29 * 100 < 29 and
    the turn of that plan would be missed.
    """
    total = Fraction(total_steps)
    turn = Fraction(str(phase_ratio)) * total
    k = min(max(Fraction(step), Fraction(0)), total)
    return float(1 - k / turn if k <= turn else (turn - k) / (total - turn))


def _phase_two_lower(phase: float, lower_schedule: LowerSchedule) -> float:
    """Weight of the lower line, 0 in phase I.

    Phase II has two readings. `text` goes from eps_std to the line, as the paper says. `printed` goes from
    the line to eps_std, as its formula (1 + lambda) M(p) - lambda eps_std does; it jumps at the turn.
    """
    if phase >= 0:
        return 0.0
    return 1.0 + phase if lower_schedule == "printed" else -phase


def _check_h_min(h_min: float | None, h_init: float, source: str) -> None:
    require(
        h_min is None or h_min <= h_init,
        f"algorithm.schedule.options.h_min={h_min} must be at most {h_init:g}, {source}: entropy oscillates "
        "between the two. Lower h_min or set a larger algorithm.schedule.options.h_init.",
    )
