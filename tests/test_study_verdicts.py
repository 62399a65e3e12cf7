"""Statistics of the verdicts against closed forms, and the numbers that are read off curves."""

from __future__ import annotations

import math

import pytest

from megatron_fec.study.experiments import EXPERIMENTS, FIG12, reference_curve
from megatron_fec.study.plots import COLOURS, DRAW
from megatron_fec.study.quantities import (
    CLIP_FRACTION,
    ENTROPY,
    EPS_UPPER,
    LATE,
    START,
    Curves,
    Window,
    clip_fraction_by_mode,
    correlation,
    cosine,
    largest,
    mean,
    pass_at,
    peak,
    shape_correlation,
    slope_correlation,
    smallest,
    switches,
    tracking_error,
)
from megatron_fec.study.verdicts import judge, t_cdf, t_quantile


def test_student_of_one_and_two_degrees_has_closed_forms() -> None:
    for t in (-3.0, -0.4, 0.0, 0.7, 2.5, 12.7):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-15)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-15)
    for p in (0.6, 0.9, 0.975):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-12)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-12)


@pytest.mark.parametrize("df", [3, 4, 5, 8, 29])
def test_student_is_the_integral_of_its_density(df: int) -> None:
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    n, t = 2000, 1.7
    heights = [scale * (1 + (t * i / n) ** 2 / df) ** (-(df + 1) / 2) for i in range(n + 1)]
    simpson = t / n / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    assert t_cdf(t, df) == pytest.approx(0.5 + simpson, abs=1e-12)
    assert t_cdf(-t, df) == pytest.approx(0.5 - simpson, abs=1e-12)


def test_a_verdict_of_three_seeds_by_hand() -> None:
    verdict = judge([1.0, 2.0, 3.0])  # mean 2, sd 1, standard error 1 / sqrt(3)
    assert (verdict.mean, verdict.sd) == (2.0, 1.0)
    assert verdict.t == pytest.approx(2 * math.sqrt(3), rel=1e-15)
    t = 2 * math.sqrt(3)
    assert verdict.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-12)
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3)
    assert verdict.interval == pytest.approx((2 - half, 2 + half), rel=1e-12)
    assert verdict.reproduces == "unclear"  # 2 - 2.48 < 0


@pytest.mark.parametrize(
    ("values", "reproduces"),
    [
        ([0.9, 1.0, 1.1], "yes"),
        ([-0.9, -1.0, -1.1], "no"),
        ([0.9, 1.0, -1.1], "unclear"),
        ([5.0], "unclear"),
        ([-0.5, -0.5], "no"),
        ([0.0, 0.0], "unclear"),
    ],
)
def test_reproduces(values: list[float], reproduces: str) -> None:
    assert judge(values).reproduces == reproduces


def test_one_seed_has_no_spread() -> None:
    verdict = judge([5.0])
    assert (verdict.mean, verdict.sd, verdict.interval, verdict.t, verdict.p) == (5.0, None, None, None, None)
    exact = judge([0.25, 0.25])
    assert (exact.sd, exact.interval, exact.t, exact.p) == (0.0, (0.25, 0.25), None, None)


def curves(total: int = 10, **metrics: list[float]) -> Curves:
    names = {"entropy": ENTROPY, "eps_upper": EPS_UPPER, "weight": "train_optim/weight_upper"}
    names |= {"up": "train_optim/clip_fraction_upper", "low": "train_optim/clip_fraction_lower"}
    length = len(next(iter(metrics.values())))
    rows = [{"step": i, **{names[k]: v[i] for k, v in metrics.items()}} for i in range(length)]
    return Curves(rows=rows, total_steps=total)


def test_windows_are_shares_of_the_plan() -> None:
    run = curves(entropy=[float(i) for i in range(11)])  # a last row after the last step, as the bandits have
    assert run.mean(ENTROPY, START) == 0.0
    assert run.mean(ENTROPY, Window(start=0.2, end=0.5)) == (2 + 3 + 4) / 3
    assert run.mean(ENTROPY, LATE) == (9 + 10) / 2
    with pytest.raises(
        ValueError, match=r"no value of train_rollouts/reward between 0\.9 and 1\.0 of the plan"
    ):
        run.mean("train_rollouts/reward", LATE)


def test_quantities_are_added_up_with_the_variants_they_need() -> None:
    seed = {"a": curves(entropy=[4.0, 2.0]), "b": curves(entropy=[1.0, 1.0])}
    a, b = mean("a", ENTROPY, Window(start=0, end=1)), mean("b", ENTROPY, Window(start=0, end=1))
    for quantity, value in ((a - b, 2.0), (a - 0.5, 2.5), (1 - a, -2.0), (a / b, 3.0)):
        assert quantity.of(seed) == value
    assert (a - b).variants == largest([a, b]).variants == {"a", "b"} and (1 - a).variants == {"a"}
    assert largest([a, b]).of(seed) == 3.0 and smallest([a, b]).of(seed) == 1.0


def test_clip_fraction_is_the_sum_of_both_sides_and_follows_the_mode() -> None:
    run = curves(weight=[1.0, 0.0, 0.0, 1.0], up=[0.1, 0.2, 0.3, 0.1], low=[0.1, 0.2, 0.1, 0.3])
    assert [clip for _, clip in run.points(CLIP_FRACTION)] == pytest.approx([0.2, 0.4, 0.4, 0.4])
    assert switches("od").of({"od": run}) == 2.0
    assert clip_fraction_by_mode("od").of({"od": run}) == pytest.approx(0.3 / 0.4)
    one_mode = curves(weight=[0.0, 0.0], up=[0.1, 0.2], low=[0.1, 0.2])
    assert clip_fraction_by_mode("od").of({"od": one_mode}) == 1.0
    assert switches("od").of({"od": one_mode}) == 0.0


def test_pass_at_k_is_read_at_half_of_the_plan() -> None:
    rows = [
        {"step": s, "val_rollouts/pass_at_k/1": s / 10, "val_rollouts/pass_at_k/32": s / 5} for s in (1, 4, 9)
    ]
    seed = {"id": Curves(rows=rows, total_steps=10)}
    assert pass_at("id", "first").of(seed) == 0.4 and pass_at("id", "last").of(seed) == 0.8


def test_tracking_error_by_hand() -> None:
    assert [cosine(x, 0.5) for x in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1.0, 0.75, 0.5, 0.5], abs=1e-15)
    run = curves(total=2, entropy=[2.0, 1.2, 1.1])  # targets 2, 1.5, 1
    assert tracking_error("target", end=0.5).of({"target": run}) == pytest.approx((0 + 0.2 + 0.1) / 3)


def test_correlations_of_slopes_and_shapes() -> None:
    assert correlation([(0, 1), (1, 3), (2, 5)]) == pytest.approx(1.0)
    assert correlation([(0, 2), (1, 2)]) == 0.0
    bump = [1 - (i / 10 - 1) ** 2 for i in range(21)]
    run = curves(total=20, entropy=bump, eps_upper=[20.0 - i for i in range(21)])
    assert slope_correlation("id", EPS_UPPER).of({"id": run}) > 0.9
    reference = [(i / 20, 7 + 3 * value) for i, value in enumerate(bump)]
    assert shape_correlation("id", ENTROPY, reference).of({"id": run}) == pytest.approx(1.0)
    assert shape_correlation("id", ENTROPY, [(s, -v) for s, v in reference]).of({"id": run}) == pytest.approx(
        -1.0
    )
    assert peak("id", ENTROPY, half_width=0.0).of({"id": run}) == 1.0


def test_the_digitised_curves_have_their_documented_shapes() -> None:
    entropy = reference_curve("id", "entropy")
    top = max(entropy, key=lambda point: point[1])
    assert 0.25 < top[0] < 0.35 and 0.6 < top[1] < 0.7  # step 135 of 462
    assert set(FIG12["curves"]) == {"grpo", "clip_higher", "id", "did", "od"} == set(FIG12["plan_steps"])
    clip = dict(FIG12["curves"]["did"]["clip_fraction"])
    assert clip[223] > 1.3 * clip[243]  # the step at 231


def test_every_claim_uses_runs_that_its_experiment_plans() -> None:
    for name, experiment in EXPERIMENTS.items():
        for claim in experiment.claims:
            for bed in claim.beds:
                assert claim.quantity.variants <= set(experiment.runs[bed]), (name, claim.text)
        for panel in experiment.panels:
            for bed in panel.beds:
                assert set(panel.variants) <= set(experiment.runs[bed]), (name, panel.title)
            assert panel.kind in DRAW and (panel.kind == "regions" or set(panel.variants) <= set(COLOURS))
        assert len({(claim.text, claim.beds) for claim in experiment.claims}) == len(experiment.claims)
