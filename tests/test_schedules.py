"""Schedules by hand: at step 0, at the turn, just beside it and at the end; OD as a sequence of modes."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
import reference
import torch

from megatron_fec.algorithm.schedules import SCHEDULES, OscillatoryDecay, Schedule, build_schedule
from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds
from megatron_fec.config import ScheduleConfig

BOOST, SUPPRESS = (1.0, 0.0), (0.0, 1.0)


def plan(name: str, total_steps: int = 400, **settings: Any) -> Schedule:
    if name in ("id", "did"):
        settings = {"lower_schedule": "text", **settings}
    return build_schedule(ScheduleConfig(name=name, total_steps=total_steps, options=settings))


def at(schedule: Schedule, step: int, entropy: float = 1.0) -> tuple[float, float]:
    weights = schedule.weights(step, entropy)
    return weights.upper, weights.lower


def run(schedule: Schedule, entropies: Sequence[float], first_step: int = 0) -> list[tuple[float, float]]:
    return [at(schedule, first_step + i, h) for i, h in enumerate(entropies)]


@pytest.mark.parametrize("step", [0, 1, 200, 201, 400, 1000])
@pytest.mark.parametrize(
    ("name", "weights"),
    [("grpo", (0, 0)), ("static", (0, 0)), ("dynamic_upper", (1, 0)), ("dynamic_lower", (0, 1))],
)
def test_constant_weights(name: str, weights: tuple[float, float], step: int) -> None:
    assert at(plan(name), step) == weights


@pytest.mark.parametrize(
    ("step", "id_upper", "did_upper", "text", "printed"),
    [
        (0, 1.0, 0.0, 0.0, 0.0),
        (1, 0.995, 0.005, 0.0, 0.0),
        (100, 0.5, 0.5, 0.0, 0.0),
        (200, 0.0, 1.0, 0.0, 0.0),  # the turn is still phase I
        (201, 0.0, 1.0, 0.005, 0.995),
        (300, 0.0, 1.0, 0.5, 0.5),
        (400, 0.0, 1.0, 1.0, 0.0),
        (401, 0.0, 1.0, 1.0, 0.0),  # the end is held
    ],
)
def test_id_and_did(step: int, id_upper: float, did_upper: float, text: float, printed: float) -> None:
    for name, upper in (("id", id_upper), ("did", did_upper)):
        assert at(plan(name, lower_schedule="text"), step) == pytest.approx((upper, text), abs=1e-15)
        assert at(plan(name, lower_schedule="printed"), step) == pytest.approx((upper, printed), abs=1e-15)


# (upper at p = 0.1, at p = 0.9), (lower at p = 0.1, at p = 0.9)
TABLE = {
    ("id", "text", 0): ((0.475, 0.275), (0.2, 0.2)),
    ("id", "text", 100): ((0.3375, 0.2375), (0.2, 0.2)),
    ("id", "text", 200): ((0.2, 0.2), (0.2, 0.2)),
    ("id", "text", 300): ((0.2, 0.2), (0.2435, 0.1915)),
    ("id", "text", 400): ((0.2, 0.2), (0.287, 0.183)),
    ("id", "printed", 300): ((0.2, 0.2), (0.2435, 0.1915)),
    ("id", "printed", 400): ((0.2, 0.2), (0.2, 0.2)),
    ("did", "text", 0): ((0.2, 0.2), (0.2, 0.2)),
    ("did", "text", 100): ((0.3375, 0.2375), (0.2, 0.2)),
    ("did", "text", 200): ((0.475, 0.275), (0.2, 0.2)),
    ("did", "text", 300): ((0.475, 0.275), (0.2435, 0.1915)),
    ("did", "text", 400): ((0.475, 0.275), (0.287, 0.183)),
    ("did", "printed", 400): ((0.475, 0.275), (0.2, 0.2)),
}


@pytest.mark.parametrize(("name", "reading", "step"), TABLE)
def test_distances_by_hand(name: str, reading: str, step: int) -> None:
    weights = plan(name, lower_schedule=reading).weights(step, 1.0)
    bounds = clip_bounds(torch.tensor([0.1, 0.9], dtype=torch.float64), weights, lines=ThresholdLines())
    upper, lower = TABLE[name, reading, step]
    assert bounds.eps_upper.tolist() == pytest.approx(upper, rel=1e-12)
    assert bounds.eps_lower.tolist() == pytest.approx(lower, rel=1e-12)


def test_just_after_the_turn_only_the_printed_reading_jumps() -> None:
    total = 2_000_000
    p = torch.tensor([0.1, 0.9], dtype=torch.float64)
    for reading, expected in (("printed", (0.287, 0.183)), ("text", (0.2, 0.2))):
        weights = plan("id", total, lower_schedule=reading).weights(total // 2 + 1, 1.0)
        lower = clip_bounds(p, weights, lines=ThresholdLines()).eps_lower
        assert lower.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["id", "did"])
@pytest.mark.parametrize("reading", ["text", "printed"])
@pytest.mark.parametrize(("total", "rho"), [(10, 0.3), (10, 0.4), (7, 0.5), (11, 0.6), (400, 0.3), (1, 0.5)])
def test_every_step_against_the_equations(name: str, reading: str, total: int, rho: float) -> None:
    schedule = plan(name, total, lower_schedule=reading, phase_ratio=rho)
    for step in range(total + 1):
        for p in (0.1, 0.9):
            bounds = clip_bounds(
                torch.tensor([p], dtype=torch.float64), schedule.weights(step, 1.0), lines=ThresholdLines()
            )
            expected = reference.scheduled_bounds(name, p, step, total, rho, reading)
            assert (bounds.eps_lower.item(), bounds.eps_upper.item()) == pytest.approx(expected, rel=1e-12)


def test_the_turn_is_where_the_user_wrote_it() -> None:
    assert 0.29 * 100 < 29  # the trap: step 29 would be in phase II, with the full line
    schedule = plan("id", 100, phase_ratio=0.29, lower_schedule="printed")
    assert at(schedule, 29) == (0.0, 0.0)
    assert at(schedule, 30) == pytest.approx((0.0, 1 - 1 / 71))


def test_schedules_without_state() -> None:
    for name in ("grpo", "dynamic_upper", "id", "did"):
        schedule = plan(name)
        assert schedule.state_dict() == schedule.metrics() == {}
        schedule.load_state_dict({})


# T = 10, H_init = 1: boost at or below 0.2, suppress above 0.2 + 0.8 (1 - k / 10)
OSCILLATION = [
    (1.00, SUPPRESS),  # the first state
    (0.50, SUPPRESS),  # held
    (0.20, BOOST),  # equal to H_min
    (0.70, BOOST),  # ceiling 0.76
    (0.69, SUPPRESS),  # ceiling 0.68
    (0.25, SUPPRESS),  # held
    (0.19, BOOST),
    (0.30, BOOST),  # ceiling 0.44
    (0.37, SUPPRESS),  # ceiling 0.36
    (0.21, SUPPRESS),  # held: ceiling 0.28
    (0.10, BOOST),
    (0.21, SUPPRESS),  # after T the ceiling stays at H_min
]
ENTROPIES = [h for h, _ in OSCILLATION]
MODES = [mode for _, mode in OSCILLATION]


def test_oscillation_by_hand() -> None:
    assert run(plan("od", 10), ENTROPIES) == MODES


@pytest.mark.parametrize("split", range(len(OSCILLATION)))
def test_oscillation_resumes(split: int) -> None:
    before = plan("od", 10)
    assert run(before, ENTROPIES[:split]) == MODES[:split]
    after = plan("od", 10)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.state_dict() == before.state_dict()
    assert run(after, ENTROPIES[split:], split) == MODES[split:]


def test_without_the_state_a_resumed_run_would_differ() -> None:
    assert run(plan("od", 10), ENTROPIES[3:], 3) != MODES[3:]


def test_h_init_is_measured_once() -> None:
    schedule = plan("od", 10)
    run(schedule, [1.5, 3.0, 0.4])
    assert schedule.state_dict()["h_init"] == 1.5
    resumed = plan("od", 10)
    resumed.load_state_dict(schedule.state_dict())
    at(resumed, 3, 9.0)
    assert resumed.state_dict()["h_init"] == 1.5


def test_a_configured_h_init_is_not_measured() -> None:
    schedule = plan("od", 10, h_init=2.0)
    assert run(schedule, [0.41, 0.4]) == [SUPPRESS, BOOST]  # H_min = 0.4
    assert schedule.state_dict()["h_init"] == 2.0
    other = plan("od", 10, h_init=3.0)
    other.load_state_dict(schedule.state_dict())
    assert other.state_dict()["h_init"] == 3.0


def test_the_first_state_is_suppress_even_below_the_ceiling() -> None:
    assert at(plan("od", 10, h_init=2.0), 0, 1.0) == SUPPRESS


def test_equal_to_the_ceiling_is_held() -> None:
    schedule = plan("od", 2, h_init=1.0, h_min=0.5)
    assert run(schedule, [0.5, 0.75]) == [BOOST, BOOST]  # 0.5 + 0.5 (1 - 1/2), exact in binary
    assert at(schedule, 1, 0.7501) == SUPPRESS


def test_h_min_replaces_the_ratio() -> None:
    assert run(plan("od", 10, h_min=0.15, h_init=1.0), [0.16, 0.15]) == [SUPPRESS, BOOST]
    assert run(plan("od", 10, h_min_ratio=0.5, h_init=1.0), [0.51, 0.5]) == [SUPPRESS, BOOST]


def test_low_is_tested_before_high() -> None:
    # from T on both thresholds are H_min: at it, boost
    assert at(plan("od", 4, h_init=1.0, h_min=0.25), 9, 0.25) == BOOST


def test_entropy_is_smoothed() -> None:
    # 1, 0.75 * 1 + 0.25 * 0, ...: passes 0.2 at the sixth zero, 0.75^6 = 0.178
    schedule = plan("od", 1000, entropy_ema=0.75)
    assert run(schedule, [1.0] + [0.0] * 6) == [SUPPRESS] * 6 + [BOOST]
    assert schedule.state_dict()["entropy"] == pytest.approx(0.75**6)
    assert run(plan("od", 1000), [1.0, 0.0]) == [SUPPRESS, BOOST]


@pytest.mark.parametrize("entropy", [float("nan"), float("inf")])
def test_a_bad_entropy_stops_the_run(entropy: float) -> None:
    with pytest.raises(RuntimeError, match=r"entropy=(nan|inf) at step 3 must be finite"):
        at(plan("od", 10), 3, entropy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "idd"}, "algorithm.schedule.name=idd must be one of grpo, static,"),
        ({"name": "idd"}, "Did you mean id?"),
        (
            {"name": "id", "lower_schedule": None},
            "algorithm.schedule.options.lower_schedule=None must be one of text, printed",
        ),
        (
            {"name": "did", "lower_schedule": "x"},
            "algorithm.schedule.options.lower_schedule=x must be one of text, printed",
        ),
        (
            {"name": "id", "phase_ratio": 1.0},
            "algorithm.schedule.options.phase_ratio=1.0 must be between 0 and 1",
        ),
        (
            {"name": "did", "phase_ratio": 0.0},
            "algorithm.schedule.options.phase_ratio=0.0 must be between 0 and 1",
        ),
        (
            {"name": "id", "total_steps": 0},
            "algorithm.schedule.total_steps=0 must be an integer of at least 1",
        ),
        ({"name": "did", "total_steps": -3}, "algorithm.schedule.total_steps=-3 must be an integer"),
        ({"name": "od", "total_steps": "???"}, "algorithm.schedule.total_steps=??? must be an integer"),
        ({"name": "od", "h_init": 0.0}, "options.h_init=0.0 must be greater than 0, or null"),
        ({"name": "od", "h_min": 0.0}, "options.h_min=0.0 must be greater than 0, or null"),
        ({"name": "od", "h_min_ratio": 1.5}, "algorithm.schedule.options.h_min_ratio=1.5 must be in (0, 1]"),
        ({"name": "od", "h_min_ratio": 0.0}, "algorithm.schedule.options.h_min_ratio=0.0 must be in (0, 1]"),
        ({"name": "od", "entropy_ema": 1.0}, "algorithm.schedule.options.entropy_ema=1.0 must be in [0, 1)"),
        (
            {"name": "od", "entropy_ema": -0.1},
            "algorithm.schedule.options.entropy_ema=-0.1 must be in [0, 1)",
        ),
        ({"name": "od", "h_min": 2.0, "h_init": 1.0}, "options.h_min=2.0 must be at most 1, algorithm"),
        ({"name": "od", "h_mim": 0.1}, "options.h_mim is not read by od. Did you mean h_min?"),
        (
            {"name": "id", "h_min": 0.1},
            "options.h_min is not read by id. Its settings are lower_schedule, phase_ratio.",
        ),
        (
            {"name": "od", "phase_ratio": 0.4},
            "options.phase_ratio is not read by od. Did you mean h_min_ratio?",
        ),
        (
            {"name": "grpo", "lower_schedule": "text"},
            "options.lower_schedule is not read by grpo. It has no settings.",
        ),
        ({"name": "dynamic_upper", "phase_ratio": 0.3}, "options.phase_ratio is not read by dynamic_upper"),
    ],
)
def test_a_bad_setting_stops_at_construction(settings: dict[str, Any], message: str) -> None:
    name, total_steps = settings.pop("name"), settings.pop("total_steps", 10)
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(name, total_steps, **settings)


def test_a_static_schedule_needs_a_constant_name() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.schedule\.name=id must be one of grpo, static"):
        SCHEDULES["grpo"](ScheduleConfig(name="id", total_steps=10))


def test_h_min_above_the_measured_entropy_stops_at_the_first_step() -> None:
    with pytest.raises(
        ValueError, match=r"h_min=0\.5 must be at most 0\.4, the entropy measured.*Lower h_min"
    ):
        at(plan("od", 10, h_min=0.5), 0, 0.4)


@pytest.mark.parametrize(("saved", "resumed"), [("od", "id"), ("grpo", "od")])
def test_the_state_of_another_schedule_is_refused(saved: str, resumed: str) -> None:
    with pytest.raises(ValueError, match="was saved under another schedule"):
        plan(resumed).load_state_dict(plan(saved).state_dict())


def test_two_ranks_decide_alike() -> None:
    one, two = plan("od", 10), plan("od", 10)
    assert isinstance(one, OscillatoryDecay)
    assert run(one, ENTROPIES) == run(two, ENTROPIES) and one.state_dict() == two.state_dict()
