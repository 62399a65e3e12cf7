"""mean@k and pass@k against counting every draw."""

from itertools import combinations

import pytest

from megatron_fec.evaluate import evaluation_metrics, pass_at_k


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
