"""What every schedule checks: a number of steps, a state that is its own, an entropy that is a number."""

from __future__ import annotations

import math
from typing import Any

from megatron_fec.config import ConfigError


def require(is_met: bool, message: str) -> None:
    if not is_met:
        raise ConfigError(message)


def check_total_steps(total_steps: int) -> None:
    require(
        isinstance(total_steps, int) and total_steps >= 1,
        f"algorithm.schedule.total_steps={total_steps} must be an integer of at least 1. "
        "Set it to the number of steps that the plan spans.",
    )


def check_entropy(entropy: float, step: int) -> None:
    if not math.isfinite(entropy):
        raise RuntimeError(
            f"entropy={entropy} at step {step} must be finite. Look for the NaN in the log-probs."
        )


def check_state(state: dict[str, Any], own: dict[str, Any]) -> None:
    require(
        state.keys() == own.keys(),
        f"the checkpoint's schedule state has keys {sorted(state)}, and algorithm.schedule.name needs "
        f"{sorted(own)}: it was saved under another schedule. Resume with that schedule, or use a new "
        "trainer.run_dir.",
    )
