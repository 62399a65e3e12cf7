"""Group-relative advantages."""

import pytest
import reference
import torch

from megatron_fec.algorithm.advantages import group_advantages

REWARDS = [[1.0, 0.0, 0.0, 1.0, 1.0], [0.3, -2.0, 0.1, 5.0, 0.1], [0.0, 0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("delta", [1e-6, 0.5])
def test_float64_against_reference(delta: float) -> None:
    got = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), delta=delta)
    expected = torch.tensor(reference.group_advantages(REWARDS, delta), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_float32_against_reference() -> None:
    got = group_advantages(torch.tensor(REWARDS), delta=1e-6)
    assert got.dtype == torch.float32
    expected = torch.tensor(reference.group_advantages(torch.tensor(REWARDS).tolist(), 1e-6))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_by_hand() -> None:
    # mean 0.5, unbiased variance (4 * 0.25) / 3
    got = group_advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64), delta=0.0)
    assert got[0].tolist() == pytest.approx([0.75**0.5, -(0.75**0.5)] * 2, rel=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 1e4 / 3])
@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(reward: float, size: int, dtype: torch.dtype) -> None:
    rewards = torch.full((2, size), reward, dtype=dtype)
    rewards[1, 0] += 1
    got = group_advantages(rewards, delta=1e-6)
    assert torch.equal(got[0], torch.zeros(size, dtype=dtype))
    assert got[1, 0] > 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_other_dtypes_become_float32(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1, 0, 0], [1, 1, 0]])
    got = group_advantages(rewards.to(dtype), delta=1e-6)
    assert torch.equal(got, group_advantages(rewards.float(), delta=1e-6))


def test_input_is_not_changed() -> None:
    rewards = torch.tensor(REWARDS)
    group_advantages(rewards, delta=1e-6)
    assert torch.equal(rewards, torch.tensor(REWARDS))


@pytest.mark.parametrize("shape", [(3, 1), (4,), (3, 0)])
def test_a_group_needs_two(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"group of at least 2.*rollout\.group_size"):
        group_advantages(torch.zeros(shape), delta=1e-6)
