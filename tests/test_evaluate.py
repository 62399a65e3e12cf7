"""mean@k and pass@k against counting every draw, and their confidence intervals against known truths."""

import math
from itertools import combinations

import numpy as np
import pytest

from megatron_fec.evaluate import estimate, estimates, evaluation_metrics, pass_at_k, powers_of_two


def share_of_draws(num_samples: int, num_right: int, k: int) -> float:
    """Share of the k-subsets of the samples that hold a right one; the first num_right are right."""
    draws = list(combinations(range(num_samples), k))
    return sum(min(draw) < num_right for draw in draws) / len(draws)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_counts_the_draws_that_hold_a_right_answer(num_samples: int):
    for num_right in range(num_samples + 1):
        for k in range(1, num_samples + 1):
            expected = share_of_draws(num_samples, num_right, k)
            assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_outside_the_samples_is_refused(k: int):
    with pytest.raises(
        ValueError, match=rf"k={k} must be between 1 and the 3 samples of a prompt\. Sample more"
    ):
        pass_at_k(3, 1, k)


def test_metrics_of_two_prompts_by_hand():
    metrics = evaluation_metrics([[1.0, 0.0, 0.0, 0.0], [0.5, 0.0, 1.0, 0.0]])
    assert metrics == {
        "mean_at_k/4": 3 / 8,
        "pass_at_k/1": pytest.approx((1 / 4 + 1 / 2) / 2),
        "pass_at_k/2": pytest.approx((1 / 2 + 5 / 6) / 2),
        "pass_at_k/4": 1.0,
    }


def test_k_stops_at_the_last_power_of_two():
    assert list(evaluation_metrics([[1.0] * 5])) == [
        "mean_at_k/5",
        "pass_at_k/1",
        "pass_at_k/2",
        "pass_at_k/4",
    ]


def test_a_negative_reward_is_not_a_right_answer():
    assert evaluation_metrics([[-1.0, 0.0]]) == {"mean_at_k/2": 0.0, "pass_at_k/1": 0.0, "pass_at_k/2": 0.0}


# ------------------------------------------------------------------ confidence intervals


def wilson_roots(mean: float, answers: float) -> list[float]:
    """The two p with (mean - p)^2 = z^2 p (1 - p) / answers, by the quadratic formula."""
    z2 = 1.959963984540054**2
    roots = np.roots([1 + z2 / answers, -(2 * mean + z2 / answers), mean**2])
    return sorted(root.real for root in roots)


def test_the_interval_of_yes_or_no_values_is_wilsons():
    values = [1.0] * 7 + [0.0] * 13
    found = estimate(values)
    assert found.value == 0.35
    answers = float(20 * 0.35 * 0.65 / np.var(values, ddof=1))
    assert answers == pytest.approx(19)  # the variance of a sample has one degree of freedom less
    assert [found.low, found.high] == pytest.approx(wilson_roots(0.35, answers), abs=1e-13)


def test_values_that_vary_less_than_yes_or_no_tell_more():
    values = [0.2, 0.4, 0.3, 0.5, 0.1, 0.35]
    found = estimate(values)
    answers = float(6 * np.mean(values) * (1 - np.mean(values)) / np.var(values, ddof=1))
    assert answers > 40
    assert [found.low, found.high] == pytest.approx(wilson_roots(float(np.mean(values)), answers), abs=1e-13)


@pytest.mark.parametrize(("value", "count"), [(0.0, 30), (1.0, 30), (0.5, 30), (1.0, 1), (0.25, 1)])
def test_equal_values_count_as_one_answer_a_problem(value: float, count: int):
    found = estimate([value] * count)
    roots = wilson_roots(value, count)
    assert [found.low, found.high] == pytest.approx(roots, abs=1e-13)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.1


@pytest.mark.parametrize(
    ("problems", "samples", "k", "a", "b", "least"),
    [
        (60, 8, 1, 0.3, 0.7, 0.93),
        (60, 8, 8, 0.3, 0.7, 0.93),
        (500, 4, 4, 0.3, 0.7, 0.93),
        (30, 32, 32, 8.0, 0.5, 0.93),  # nearly always 1: a bootstrap over problems covers 0 %
    ],
)
def test_the_interval_covers_the_truth(problems: int, samples: int, k: int, a: float, b: float, least: float):
    """Problems whose chance p is a Beta(a, b): the mean of pass@k over all problems is known."""
    generator = np.random.default_rng(0)
    truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))  # 1 - E[(1 - p)^k]
    table = [pass_at_k(samples, c, k) for c in range(samples + 1)]
    repetitions = 400
    chances = generator.beta(a, b, (repetitions, problems))
    right = generator.binomial(samples, chances)
    intervals = [estimate([table[c] for c in row]) for row in right.tolist()]
    covered = sum(one.low <= truth <= one.high for one in intervals) / repetitions
    assert least <= covered <= (0.975 if a < 1 else 1)


def test_estimates_of_chosen_k():
    found = estimates([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], [3, 2])
    assert list(found) == ["mean_at_k/3", "pass_at_k/3", "pass_at_k/2"]
    assert found["pass_at_k/2"].value == pytest.approx((2 / 3 + 1) / 2)
    assert found["mean_at_k/3"].value == 0.5
    with pytest.raises(ValueError, match=r"k=4 must be between 1 and the 3 samples"):
        estimates([[1.0, 0.0, 0.0]], [4])


def test_powers_of_two():
    assert [powers_of_two(n) for n in (1, 2, 3, 32)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8, 16, 32]]
