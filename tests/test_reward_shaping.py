"""Overlong punishment and the choice of groups with a signal."""

import pytest
import strategy_reference as oracle
import torch

from megatron_fec.algorithm.advantages import ADVANTAGES
from megatron_fec.algorithm.options import check_options
from megatron_fec.algorithm.reward_shaping import REWARD_SHAPING, overlong, select_informative

LENGTHS = [[1, 15, 16], [17, 18, 19], [20, 21, 40]]
REWARDS = [[1.0, 0.0, 1.0], [0.5, 1.0, 0.0], [1.0, -1.0, 0.25]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("longest", "buffer", "penalty"), [(20, 4, 1.0), (20, 4, 0.3), (19, 1, 1.0), (40, 39, 2.0)]
)
def test_overlong_against_reference(dtype: torch.dtype, longest: int, buffer: int, penalty: float) -> None:
    got = overlong(
        torch.tensor(REWARDS, dtype=dtype),
        torch.tensor(LENGTHS),
        longest,
        overlong_buffer=buffer,
        overlong_penalty=penalty,
    )
    expected = [
        [oracle.overlong(r, n, longest, buffer, penalty) for r, n in zip(*rows, strict=True)]
        for rows in zip(REWARDS, LENGTHS, strict=True)
    ]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, torch.tensor(expected, dtype=dtype), rtol=tolerance, atol=tolerance)


def test_overlong_by_hand() -> None:
    got = REWARD_SHAPING["overlong"](
        torch.ones(1, 6), torch.tensor([[15, 16, 17, 18, 20, 25]]), 20, overlong_buffer=4
    )
    assert got.tolist() == [[1.0, 1.0, 0.75, 0.5, 0.0, 0.0]]


def test_integer_rewards_are_not_truncated() -> None:
    got = overlong(torch.tensor([[1, 0]]), torch.tensor([[17, 19]]), 20, overlong_buffer=4)
    assert got.tolist() == [[0.75, -0.75]]


def test_inputs_are_not_changed() -> None:
    rewards, lengths = torch.tensor(REWARDS), torch.tensor(LENGTHS)
    overlong(rewards, lengths, 20, overlong_buffer=4)
    assert torch.equal(rewards, torch.tensor(REWARDS)) and torch.equal(lengths, torch.tensor(LENGTHS))


@pytest.mark.parametrize("buffer", [20, 21])
def test_a_buffer_as_long_as_a_response_is_refused(buffer: int) -> None:
    none = torch.zeros(0, 2)  # so that a run can check it before its first rollout
    with pytest.raises(
        ValueError, match=rf"overlong_buffer={buffer} must be less than rollout\.max_response_tokens=20"
    ):
        overlong(none, none, 20, overlong_buffer=buffer)
    assert overlong(none, none, 20, overlong_buffer=19).shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"algorithm\.options\.overlong_buffer is required by overlong"),
        ({"overlong_buffer": 0}, r"overlong_buffer=0 must be an integer of at least 1"),
        ({"overlong_buffer": 0.5}, r"overlong_buffer=0\.5 must be an integer of at least 1"),
        ({"overlong_buffer": 4, "overlong_penalty": 0}, r"overlong_penalty=0 must be greater than 0"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(REWARD_SHAPING, options, key="algorithm.options")
    check_options(REWARD_SHAPING, {"overlong_buffer": 4, "overlong_penalty": 0.5}, key="algorithm.options")


def test_a_group_has_a_signal_where_its_rewards_differ() -> None:
    rewards = torch.tensor(
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.1, 0.1, 0.1], [0.5, 0.4, 0.5]]
    )
    assert select_informative(rewards).tolist() == [False, False, True, False, True]
    assert select_informative(rewards.bool()).tolist() == [False, False, True, False, False]


def test_without_a_signal_grpo_learns_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(2, (200, 4), generator=generator).float()
    informative = select_informative(rewards)
    assert 0 < informative.sum() < 200
    assert torch.equal(ADVANTAGES["grpo"](rewards).any(1), informative)


def test_the_choice_is_of_the_rewards_before_shaping() -> None:
    rewards, lengths = torch.zeros(1, 2), torch.tensor([[10, 20]])
    assert not select_informative(rewards).any()
    assert select_informative(overlong(rewards, lengths, 20, overlong_buffer=4)).all()
