"""What the study runs, as data: a variant is a list of settings of the configuration, a bed is where it is tried.

A bed is a policy with a task. All beds read the same settings, through the same configuration.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bed:
    title: str
    matched: float  # a constant upper distance as wide as the upper line is on average in this bed, measured


BEDS = {
    "exact": Bed(title="exact expectation", matched=0.32),
    "tabular": Bed(title="tabular bandit", matched=0.32),
    "random": Bed(title="tabular bandit, random rewards", matched=0.32),
    "embedded": Bed(title="embedded task, real trainer", matched=0.31),
}
CONSTANT = 0.28  # Clip-Higher's, and the static ablation's; for the lower side the paper gives none, so it is the same
_CONSTANTS = (f"algorithm.thresholds.upper=[0,{CONSTANT}]", f"algorithm.thresholds.lower=[0,{CONSTANT}]")


def _schedule(name: str, *settings: str) -> tuple[str, ...]:
    return (f"algorithm.schedule.name={name}", *settings)


def _phased(name: str, *settings: str, reading: str = "text") -> tuple[str, ...]:
    return _schedule(name, f"algorithm.schedule.options.lower_schedule={reading}", *settings)


def _static_upper(line: str) -> tuple[str, ...]:
    return _schedule("dynamic_upper", f"algorithm.thresholds.upper={line}")


def _target(*settings: str) -> tuple[str, ...]:
    return _schedule("target", *(f"algorithm.schedule.options.{setting}" for setting in settings))


_GRPO = ("algorithm.schedule.name=grpo",)
_OD_HIGH = "algorithm.schedule.options.h_min_ratio=0.6"
REGIONS = ("E1", "E2", "E3", "E4")
VARIANTS: dict[str, tuple[str, ...]] = {
    "grpo": _GRPO,
    "clip_higher": _static_upper(f"[0,{CONSTANT}]"),
    "matched": _static_upper("[0,{matched}]"),
    "dynamic_upper": _schedule("dynamic_upper"),
    "dynamic_lower": _schedule("dynamic_lower"),
    "id": _phased("id"),
    "did": _phased("did"),
    "did_printed": _phased("did", reading="printed"),
    "od": _schedule("od"),
    "od_0.6": _schedule("od", _OD_HIGH),
    "static_id": _phased("id", *_CONSTANTS),
    "static_did": _phased("did", *_CONSTANTS),
    **{
        f"id_{rho}": _phased("id", f"algorithm.schedule.options.phase_ratio={rho}") for rho in (0.3, 0.4, 0.6)
    },
    "target": _target("target_shape=cosine", "target_end=0.5"),
    "target_hold": _target("target_shape=constant"),
    # Every token that has moved towards its advantage loses its gradient, on one side; the base of the regions.
    "closed_upper": _static_upper("[0,1.0e-9]"),
    "closed_lower": ("algorithm.schedule.name=dynamic_lower", "algorithm.thresholds.lower=[0,1.0e-9]"),
    **{
        f"{mode}_{e}": (
            *_GRPO,
            "algorithm.policy_loss=region",
            f"algorithm.options.region={e}",
            f"algorithm.options.mode={mode}",
        )
        for mode in ("only", "extend")
        for e in REGIONS
    },
}
SHORT = {f"only_{e}" for e in REGIONS}  # runs of half the steps: the sign of the change is seen early


def overrides(bed: str, variant: str) -> list[str]:
    """The settings of a variant in a bed, as key=value."""
    return [setting.replace("{matched}", str(BEDS[bed].matched)) for setting in VARIANTS[variant]]
