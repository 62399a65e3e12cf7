"""Clip distances: the lines, the blend, the floor, and no gradient."""

import dataclasses

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_fec import types
from megatron_fec.algorithm import thresholds
from megatron_fec.algorithm.thresholds import EPS_FLOOR, ThresholdLines, clip_bounds
from megatron_fec.types import BlendWeights

LINES = ThresholdLines()
PROBS = [0.0, 1e-6, 0.1, 0.3, 0.5, 0.769, 0.88, 0.9, 1.0]
weight = st.floats(0, 1)
probability = st.floats(0, 1)


def bounds_at(p: float, upper: float, lower: float) -> tuple[float, float]:
    bounds = clip_bounds(
        torch.tensor([p], dtype=torch.float64), BlendWeights(upper=upper, lower=lower), lines=LINES
    )
    return bounds.eps_lower.item(), bounds.eps_upper.item()


def test_the_default_lines_are_the_papers() -> None:
    assert dataclasses.asdict(LINES) == {"eps_std": 0.2, "upper": (-0.25, 0.5), "lower": (-0.13, 0.3)}


def test_types_are_reexported() -> None:
    assert thresholds.BlendWeights is types.BlendWeights and thresholds.ClipBounds is types.ClipBounds


@pytest.mark.parametrize(("p", "lower", "upper"), [(0.1, 0.287, 0.475), (0.9, 0.183, 0.275)])
def test_full_weights_give_the_lines(p: float, lower: float, upper: float) -> None:
    assert bounds_at(p, 1.0, 1.0) == pytest.approx((lower, upper), rel=1e-12)
    assert bounds_at(p, 1.0, 0.0) == pytest.approx((0.2, upper), rel=1e-12)
    assert bounds_at(p, 0.0, 1.0) == pytest.approx((lower, 0.2), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_weights_give_eps_std_bit_for_bit(dtype: torch.dtype) -> None:
    bounds = clip_bounds(torch.tensor(PROBS, dtype=dtype), BlendWeights(upper=0.0, lower=0.0), lines=LINES)
    expected = torch.full((len(PROBS),), 0.2, dtype=dtype)
    assert bounds.eps_lower.dtype == bounds.eps_upper.dtype == dtype
    assert torch.equal(bounds.eps_lower, expected) and torch.equal(bounds.eps_upper, expected)


@pytest.mark.parametrize("w_upper", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("w_lower", [0.0, 0.6, 1.0])
def test_blend_against_reference(w_upper: float, w_lower: float) -> None:
    bounds = clip_bounds(
        torch.tensor(PROBS, dtype=torch.float64), BlendWeights(upper=w_upper, lower=w_lower), lines=LINES
    )
    expected = [reference.bounds(p, w_upper, w_lower) for p in PROBS]
    got = list(zip(bounds.eps_lower.tolist(), bounds.eps_upper.tolist(), strict=True))
    for pair, wanted in zip(got, expected, strict=True):
        assert pair == pytest.approx(wanted, rel=1e-12)


def test_static_lines_of_slope_zero_ignore_p() -> None:
    lines = ThresholdLines(upper=(0.0, 0.28), lower=(0.0, 0.28))
    bounds = clip_bounds(torch.tensor(PROBS), BlendWeights(upper=1.0, lower=1.0), lines=lines)
    for eps in (bounds.eps_lower, bounds.eps_upper):
        assert torch.allclose(eps, torch.full_like(eps, 0.28), rtol=1e-6)


def test_bounds_carry_no_gradient() -> None:
    probs = torch.tensor(PROBS, requires_grad=True)
    bounds = clip_bounds(probs, BlendWeights(upper=1.0, lower=0.5), lines=LINES)
    assert not bounds.eps_lower.requires_grad and not bounds.eps_upper.requires_grad


def test_extrapolating_weights_are_floored() -> None:
    assert bounds_at(0.1, 2.0, -0.5) == pytest.approx((0.2 - 0.5 * 0.087, 0.2 + 2 * 0.275), rel=1e-12)
    assert bounds_at(0.1, -3.0, -3.0) == (EPS_FLOOR, EPS_FLOOR)
    assert bounds_at(1.0, 0.0, 9.0) == (EPS_FLOOR, 0.2)


def test_no_floor_between_the_ends() -> None:
    lines = ThresholdLines(eps_std=3e-4, upper=(0.0, 4e-4), lower=(0.0, 2e-4))
    p = torch.tensor([0.5], dtype=torch.float64)
    assert clip_bounds(p, BlendWeights(upper=0.0, lower=0.0), lines=lines).eps_lower.item() == 3e-4
    assert clip_bounds(p, BlendWeights(upper=1.0, lower=1.0), lines=lines).eps_lower.item() == pytest.approx(
        2e-4
    )


@given(p=probability, w_upper=weight, w_lower=weight)
def test_a_distance_is_positive_and_the_lower_bound_is_a_ratio(
    p: float, w_upper: float, w_lower: float
) -> None:
    eps_lower, eps_upper = bounds_at(p, w_upper, w_lower)
    assert 0 < eps_lower < 1 and 0 < eps_upper < float("inf")


@given(p=st.floats(0, 0.99), gap=st.floats(1e-3, 0.01), w=st.floats(1e-3, 1))
def test_bounds_fall_as_p_rises(p: float, gap: float, w: float) -> None:
    before, after = bounds_at(p, w, w), bounds_at(p + gap, w, w)
    assert after[0] < before[0] and after[1] < before[1]


@given(p=probability, u=st.floats(-20, 20))
def test_a_closed_loop_may_ask_for_anything(p: float, u: float) -> None:
    # the ends of a line in [0, 1] are themselves above the floor, whatever the side
    assert min(bounds_at(p, u, -u)) >= EPS_FLOOR


def ratio_grid() -> tuple[Tensor, Tensor]:
    """(q, r) with p = r q <= 1, away from both bounds of equation 8 by more than rounding."""
    q, r = torch.meshgrid(
        torch.linspace(0.001, 0.999, 53, dtype=torch.float64),
        torch.linspace(0.4, 1.7, 101, dtype=torch.float64),
        indexing="ij",
    )
    q, r = q.flatten(), r.flatten()
    far = ((r - 1.5 / (1 + 0.25 * q)).abs() > 1e-9) & ((r - 0.7 / (1 - 0.13 * q)).abs() > 1e-9)
    keep = far & (r * q <= 1)
    return q[keep], r[keep]


def test_equation_8_gives_the_same_masks() -> None:
    q, r = ratio_grid()
    bounds = clip_bounds(r * q, BlendWeights(upper=1.0, lower=1.0), lines=LINES)
    above, below = r > 1.5 / (1 + 0.25 * q), r < 0.7 / (1 - 0.13 * q)
    assert above.any() and below.any() and len(q) > 3000
    assert torch.equal(r > 1 + bounds.eps_upper, above)
    assert torch.equal(r < 1 - bounds.eps_lower, below)
