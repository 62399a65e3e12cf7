"""The entropy controller: its curve and its formula against the oracle, and in closed loop on an exact tabular policy."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import strategy_reference as oracle
import torch
from torch import Tensor

from megatron_fec.algorithm.schedules import Schedule, build_schedule
from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds
from megatron_fec.config import ScheduleConfig

POINTS = [[0.1, 1.5], [0.5, 0.5], [0.75, 1.0]]
CURVES = [
    {"target_shape": "cosine", "target_end": 0.5},
    {"target_shape": "cosine", "target_end": 1.3},
    {"target_shape": "linear", "target_end": 0.2},
    {"target_shape": "constant"},
    {"target_shape": "points", "target_points": POINTS},
    {"target_shape": "points", "target_points": [[0.5, 2.0]]},
]


def plan(total_steps: int = 10, **options: Any) -> Schedule:
    if "target_shape" not in options:
        options["target_shape"] = "constant"
    return build_schedule(ScheduleConfig(name="target", total_steps=total_steps, options=options))


def controls(schedule: Schedule, entropies: Sequence[float], first_step: int = 0) -> list[float]:
    """u of each step."""
    result = []
    for step, entropy in enumerate(entropies, start=first_step):
        weights = schedule.weights(step, entropy)
        assert weights.lower == -weights.upper
        result.append(weights.upper)
    return result


@pytest.mark.parametrize("options", CURVES)
@pytest.mark.parametrize("total", [1, 7, 20])
def test_curves_against_reference(options: dict[str, Any], total: int) -> None:
    schedule = plan(total, target_start=1.7, **options)
    for step in range(total + 3):
        schedule.weights(step, 1.0)
        ratio = oracle.target_ratio(
            options["target_shape"],
            step / total,
            options.get("target_end", 1.0),
            options.get("target_points", ()),
        )
        assert schedule.metrics()["target_entropy"] == pytest.approx(1.7 * ratio, rel=1e-12)
        assert schedule.metrics()["target_error"] == pytest.approx(1 - 1 / (1.7 * ratio), rel=1e-9, abs=1e-12)


def test_curves_by_hand() -> None:
    for shape, expected in (
        ("cosine", [2.0, 1.75, 1.5, 1.0, 1.0]),
        ("linear", [2.0, 2 - 1 / 3, 1.5, 1.0, 1.0]),
    ):
        schedule = plan(60, target_shape=shape, target_end=0.5)
        got = []
        for step in (0, 20, 30, 60, 61):  # cos(pi / 3) = 1/2
            schedule.weights(step, 2.0)
            got.append(schedule.metrics()["target_entropy"])
        assert got == pytest.approx(expected, rel=1e-12)


def test_the_first_entropy_is_the_start() -> None:
    schedule = plan()
    assert controls(schedule, [0.8]) == [0.0]  # H = H*
    assert schedule.state_dict()["start"] == 0.8
    # e = (0.8 - 0.76) / 0.8 = 0.05, I = 0.05, u = 10 e + I
    assert controls(schedule, [0.76], 1) == pytest.approx([0.55])
    # the same again: I = 0.1
    assert controls(schedule, [0.76], 2) == pytest.approx([0.6])
    # on the target only the integral is left; above it, u < 0
    assert controls(schedule, [0.8, 0.88], 3) == pytest.approx([0.1, -1.0])


@pytest.mark.parametrize(("kp", "ki"), [(10.0, 1.0), (0.0, 2.0), (20.0, 0.0), (3.0, 0.3)])
@pytest.mark.parametrize("deadband", [0.0, 0.05])
@pytest.mark.parametrize("spread", [0.02, 0.4])
def test_every_step_against_the_formula(kp: float, ki: float, deadband: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(200, generator=generator, dtype=torch.float64).tolist()
    # slow waves under the noise: the limit is reached and left on both sides
    entropies = [math.exp(spread * (x + 2 * math.sin(k / 15))) for k, x in enumerate(noise)]
    schedule = plan(
        target_start=1.0, proportional_gain=kp, integral_gain=ki, weight_limit=2.5, deadband=deadband
    )
    expected = oracle.controller([1 - h for h in entropies], kp, ki, 2.5, deadband)
    for step, (entropy, (u, integral, is_saturated)) in enumerate(zip(entropies, expected, strict=True)):
        assert schedule.weights(step, entropy).upper == pytest.approx(u, rel=1e-9, abs=1e-12)
        metrics = schedule.metrics()
        assert metrics["target_integral"] == pytest.approx(integral, rel=1e-9, abs=1e-12)
        assert metrics["is_saturated"] == float(is_saturated)
    if spread > 0.1 and kp:
        assert {u for u, _, _ in expected} >= {2.5, -2.5}


def test_saturation_is_a_metric_and_does_not_wind_up() -> None:
    schedule = plan(target_start=1.0)
    assert controls(schedule, [0.5] * 50) == [3.0] * 50  # e = 0.5 asks for 5
    assert schedule.metrics()["is_saturated"] == 1.0
    assert schedule.metrics()["target_integral"] == 0.0  # without anti-windup: 25
    assert controls(schedule, [1.01], 50) == pytest.approx([-0.11])
    assert schedule.metrics()["is_saturated"] == 0.0


def test_the_integral_moves_up_to_the_limit_and_back() -> None:
    schedule = plan(target_start=1.0, proportional_gain=0.0, integral_gain=1.0, weight_limit=1.0)
    assert controls(schedule, [0.6] * 4) == pytest.approx([0.4, 0.8, 0.8, 0.8])  # 1.2 is not taken up
    assert controls(schedule, [1.4], 4) == pytest.approx([0.4])


def test_an_integral_beyond_a_lowered_limit_unwinds() -> None:
    before = plan(target_start=1.0, proportional_gain=0.0, weight_limit=3.0)
    controls(before, [0.5] * 5)
    after = plan(target_start=1.0, proportional_gain=0.0, weight_limit=1.0)
    after.load_state_dict(before.state_dict())
    assert controls(after, [1.5] * 5, 5) == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])


def test_in_the_deadband_the_weights_are_held() -> None:
    schedule = plan(target_start=1.0, deadband=0.1)
    assert controls(schedule, [0.91, 1.09, 1.0]) == [0.0] * 3
    assert controls(schedule, [0.8], 3) == pytest.approx([1.1])  # the error counts from the band's edge
    assert controls(schedule, [0.95, 1.05], 4) == pytest.approx([0.1, 0.1])
    assert schedule.metrics()["target_error"] == pytest.approx(-0.05)  # the log shows the error itself


def test_entropy_is_smoothed() -> None:
    schedule = plan(entropy_ema=0.75)
    controls(schedule, [1.0, 0.0, 0.0])
    assert schedule.state_dict()["entropy"] == pytest.approx(0.75**2)
    assert schedule.metrics()["target_error"] == pytest.approx(1 - 0.75**2)


def test_before_the_first_step_there_is_nothing_to_log() -> None:
    assert plan().metrics() == {}


ENTROPIES = [0.9, 0.7, 0.95, 0.8, 0.4, 0.3, 0.5, 0.9, 0.85, 0.6, 0.6]


@pytest.mark.parametrize("split", range(len(ENTROPIES)))
def test_a_resumed_controller_gives_the_same_weights(split: int) -> None:
    def new() -> Schedule:
        return plan(target_shape="cosine", target_end=0.5, entropy_ema=0.3, deadband=0.01)

    whole = controls(new(), ENTROPIES)
    before, after = new(), new()
    assert controls(before, ENTROPIES[:split]) == whole[:split]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.state_dict() == before.state_dict()
    assert controls(after, ENTROPIES[split:], split) == whole[split:]


def test_without_the_state_a_resumed_run_would_differ() -> None:
    whole = controls(plan(), ENTROPIES)
    assert controls(plan(), ENTROPIES[2:], 2) != whole[2:]


def test_a_configured_start_goes_before_a_measured_one() -> None:
    before = plan()
    before.weights(0, 0.9)
    after = plan(target_start=2.0)
    after.load_state_dict(before.state_dict())
    assert after.state_dict()["start"] == 2.0


@pytest.mark.parametrize("entropy", [float("nan"), float("inf")])
def test_a_bad_entropy_stops_the_run(entropy: float) -> None:
    with pytest.raises(RuntimeError, match=r"entropy=(nan|inf) at step 3 must be finite"):
        plan().weights(3, entropy)


def test_a_start_of_zero_stops_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"entropy=0\.0 at step 0 must be greater than 0.*target_start"):
        plan().weights(0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "algorithm.schedule.options.target_shape is required by target"),
        ({"target_shape": "cosin"}, "target_shape=cosin must be one of cosine, linear, constant, points"),
        (
            {"target_shape": "cosine"},
            "options.target_end is required by target_shape=cosine. Set it, such as 0.5",
        ),
        (
            {"target_shape": "points"},
            "options.target_points is required by target_shape=points. Set it, such as [[",
        ),
        (
            {"target_shape": "constant", "target_end": 0.5},
            "target_end=0.5 is not read by target_shape=constant",
        ),
        (
            {"target_shape": "linear", "target_end": 0.5, "target_points": POINTS},
            "is not read by target_shape=linear. Remove it, or use points",
        ),
        ({"target_shape": "linear", "target_end": 0}, "options.target_end=0 must be greater than 0, or null"),
        ({"target_shape": "points", "target_points": []}, "target_points=[] must be pairs"),
        (
            {"target_shape": "points", "target_points": [[0, 1, 2]]},
            "must be pairs [step / total_steps, ratio]",
        ),
        (
            {"target_shape": "points", "target_points": [[0.5, 1], [0.5, 2]]},
            "with steps that rise inside [0, 1]",
        ),
        (
            {"target_shape": "points", "target_points": [[0, 1], [100, 2]]},
            "with steps that rise inside [0, 1]",
        ),
        ({"target_shape": "points", "target_points": [[0, 0]]}, "ratios greater than 0"),
        ({"target_shape": "points", "target_points": [[0, "a"]]}, "must be a list, each entry a list"),
        ({"target_shape": "constant", "weight_limit": 0}, "options.weight_limit=0 must be greater than 0"),
        ({"target_shape": "constant", "proportional_gain": -1}, "proportional_gain=-1 must be 0 or more"),
        ({"target_shape": "constant", "integral_gain": 0, "proportional_gain": 0}, "must not both be 0"),
        ({"target_shape": "constant", "deadband": 1.0}, "options.deadband=1.0 must be in [0, 1)"),
        ({"target_shape": "constant", "entropy_ema": 1}, "options.entropy_ema=1 must be in [0, 1)"),
        ({"target_shape": "constant", "gain": 1}, "options.gain is not read by target"),
    ],
)
def test_bad_options_stop_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_schedule(ScheduleConfig(name="target", total_steps=10, options=options))


# A policy whose entropy is known exactly: 128 contextual bandits with 32 actions, half of them spread out, half peaked with
# a tail. Half of the actions are right, and a right one is rewarded half of the time.


def tabular_policy(seed: int) -> tuple[Tensor, Tensor]:
    """Logits [S, V] in fp64 and which actions are right."""
    generator = torch.Generator().manual_seed(seed)
    size = (128, 32)
    spread = 4 * torch.randn(size, generator=generator, dtype=torch.float64)
    tail = torch.exp(math.log(0.005) + torch.rand(128, 1, generator=generator).double() * math.log(30))
    rank = torch.rand(size, generator=generator).argsort(1).argsort(1).double()
    zipf = torch.where(rank == 0, 0.0, 1 / rank.clamp(min=1))
    peaked = torch.where(rank == 0, 1 - tail, zipf / zipf.sum(1, keepdim=True) * tail).log()
    is_spread = torch.arange(128)[:, None] % 2 == 0
    return torch.where(is_spread, spread, peaked), torch.rand(size, generator=generator) < 0.5


def mean_entropy(logits: Tensor) -> float:
    logp = torch.log_softmax(logits, 1)
    return -(logp.exp() * logp).sum(1).mean().item()


def train(schedule: Schedule, total_steps: int, seed: int) -> tuple[list[float], list[dict[str, float]]]:
    """Entropies and the schedule's metrics of each step: 64 states, 8 actions of each, 8 clipped gradient steps."""
    logits, is_right = tabular_policy(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    entropies, metrics = [], []
    for step in range(total_steps):
        entropies.append(mean_entropy(logits))
        weights = schedule.weights(step, entropies[-1])
        metrics.append(schedule.metrics())
        states = torch.randperm(128, generator=generator)[:64]
        z = logits[states]
        old = torch.softmax(z, 1)
        actions = torch.multinomial(old, 8, replacement=True, generator=generator)
        rewards = is_right[states].gather(1, actions) * (torch.rand(64, 8, generator=generator) < 0.5)
        deviations = rewards.double() - rewards.double().mean(1, keepdim=True)
        advantages = deviations / (rewards.double().std(1, keepdim=True) + 1e-6)
        for _ in range(8):
            p = torch.softmax(z, 1)
            taken = p.gather(1, actions)
            ratio = taken / old.gather(1, actions)
            bounds = clip_bounds(taken, weights, lines=ThresholdLines())
            is_clipped = (advantages > 0) & (ratio > 1 + bounds.eps_upper)
            is_clipped |= (advantages < 0) & (ratio < 1 - bounds.eps_lower)
            push = torch.where(is_clipped, 0.0, advantages * ratio) / 8
            z = z + 0.3 * (torch.zeros_like(z).scatter_add_(1, actions, push) - p * push.sum(1, keepdim=True))
        logits[states] = z
    return entropies, metrics


def tracking_error(entropies: Sequence[float], targets: Sequence[float]) -> float:
    return oracle.mean([abs(h - t) / t for h, t in zip(entropies, targets, strict=True)])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "curve",
    [
        {"target_shape": "cosine", "target_end": 0.5},
        {"target_shape": "constant"},
        {"target_shape": "points", "target_points": [[0.0, 1.0], [0.3, 0.8], [0.6, 0.9], [1.0, 0.6]]},
    ],
)
def test_entropy_follows_the_target(curve: dict[str, Any], seed: int) -> None:
    entropies, metrics = train(plan(200, **curve), 200, seed)
    targets = [row["target_entropy"] for row in metrics]
    error = tracking_error(entropies, targets)
    assert error < 0.05
    grpo, _ = train(build_schedule(ScheduleConfig(name="grpo", total_steps=200)), 200, seed)
    assert grpo[0] == entropies[0] and tracking_error(grpo, targets) > 5 * error


def test_out_of_reach_the_controller_saturates_and_says_so() -> None:
    entropies, metrics = train(plan(200, target_shape="cosine", target_end=0.1), 200, 0)
    saturated = [row["is_saturated"] for row in metrics]
    assert sum(saturated) > 40 and set(saturated) == {0.0, 1.0}
    assert all(h > 1.2 * row["target_entropy"] for h, row in list(zip(entropies, metrics, strict=True))[-20:])
    assert max(abs(row["target_integral"]) for row in metrics) <= 3.0
