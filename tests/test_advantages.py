"""Advantages against the oracle, exact zeros, and what is remembered of a prompt."""

import inspect
import json
from collections.abc import Sequence
from typing import Any

import pytest
import strategy_reference as oracle
import torch
from torch import Tensor

from megatron_fec.algorithm.advantages import ADVANTAGES, GroupHistory, RewardHistory, group_advantages
from megatron_fec.algorithm.options import check_options

REWARDS = [
    [1.0, 0.0, 0.0, 1.0, 1.0],
    [0.3, -2.0, 0.1, 5.0, 0.1],
    [0.0, 0.0, 0.0, 0.0, 1.0],
    [0.1] * 5,
]
IDS = [7, 3, 11, 2]
UNSEEN = RewardHistory().lookup(IDS)
SETTINGS: list[tuple[str, dict[str, Any], list[list[float]]]] = [
    ("grpo", {}, oracle.grpo(REWARDS, 1e-6)),
    ("grpo", {"advantage_delta": 0.5}, oracle.grpo(REWARDS, 0.5)),
    ("dr_grpo", {}, oracle.dr_grpo(REWARDS)),
    ("rloo", {}, oracle.rloo(REWARDS)),
    ("reinforce_pp", {}, oracle.reinforce_pp(REWARDS, "batch", 1e-6)),
    ("reinforce_pp", {"advantage_delta": 0.5}, oracle.reinforce_pp(REWARDS, "batch", 0.5)),
    ("reinforce_pp", {"reinforce_baseline": "group"}, oracle.reinforce_pp(REWARDS, "group", 1e-6)),
    ("qae", {}, oracle.qae(REWARDS, 0.4, "inverted_cdf", 1e-6)),
    ("qae", {"qae_quantile": 0.7}, oracle.qae(REWARDS, 0.7, "inverted_cdf", 1e-6)),
    ("qae", {"quantile_method": "linear"}, oracle.qae(REWARDS, 0.4, "linear", 1e-6)),
    (
        "qae",
        {"qae_quantile": 0.9, "quantile_method": "linear", "advantage_delta": 0.5},
        oracle.qae(REWARDS, 0.9, "linear", 0.5),
    ),
    ("dcpo", {}, oracle.grpo(REWARDS, 1e-6)),  # the first visit
    ("dcpo", {"advantage_delta": 0.5}, oracle.grpo(REWARDS, 0.5)),
]


def advantages(name: str, rewards: Tensor, history: GroupHistory = UNSEEN, **options: Any) -> Tensor:
    return ADVANTAGES[name](rewards, history, **options)


def test_every_name_is_covered() -> None:
    assert {name for name, _, _ in SETTINGS} == set(ADVANTAGES)


@pytest.mark.parametrize(("name", "options", "expected"), SETTINGS)
def test_float64_against_reference(name: str, options: dict[str, Any], expected: list[list[float]]) -> None:
    got = advantages(name, torch.tensor(REWARDS, dtype=torch.float64), **options)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options", "expected"), SETTINGS)
def test_float32_against_reference(name: str, options: dict[str, Any], expected: list[list[float]]) -> None:
    got = advantages(name, torch.tensor(REWARDS), **options)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("name", ADVANTAGES)
def test_options_have_types(name: str) -> None:
    function = ADVANTAGES[name]
    defaults = {
        p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY
    }
    check_options({name: function}, defaults, key="algorithm.options")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qae_quantile": 0.0}, r"qae_quantile=0\.0 must be between 0 and 1"),
        ({"qae_quantile": 1}, r"qae_quantile=1 must be between 0 and 1"),
        ({"quantile_method": "nearest"}, r"quantile_method=nearest must be one of inverted_cdf, linear"),
        ({"advantage_delta": 0}, r"advantage_delta=0 must be greater than 0"),
        ({"reinforce_baseline": "batch"}, r"reinforce_baseline is not read by qae"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options({"qae": ADVANTAGES["qae"]}, options, key="algorithm.options")


def test_by_hand() -> None:
    # mean 0.5, unbiased variance (4 * 0.25) / 3
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    got = group_advantages(rewards, advantage_delta=0.0)
    assert got[0].tolist() == pytest.approx([0.75**0.5, -(0.75**0.5)] * 2, rel=1e-12)
    assert advantages("dr_grpo", rewards)[0].tolist() == [0.5, -0.5, 0.5, -0.5]
    assert advantages("rloo", rewards)[0].tolist() == pytest.approx([2 / 3, -2 / 3] * 2, rel=1e-12)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, -1 / 3, 1e4 / 3])
@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(name: str, reward: float, size: int, dtype: torch.dtype) -> None:
    rewards = torch.full((2, size), reward, dtype=dtype)
    history = RewardHistory()
    for _ in range(3):  # for dcpo: whatever the number of visits
        got = advantages(name, rewards, history.lookup([0, 1]))
        assert torch.equal(got, torch.zeros(2, size, dtype=dtype))
        history.add([0, 1], rewards)
        seen = history.lookup([0])
        assert seen.mean.item() == rewards[0, 0].item() and seen.squares.item() == 0


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "qae"])
def test_equal_rewards_give_zero_beside_others(name: str) -> None:
    rewards = torch.full((2, 5), 0.1)
    rewards[1, 0] += 1
    got = advantages(name, rewards)
    assert torch.equal(got[0], torch.zeros(5)) and got[1, 0] > 0


def test_reinforce_pp_compares_with_the_whole_batch() -> None:
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    # mean 0.5, unbiased variance 1 / 3
    got = advantages("reinforce_pp", rewards, advantage_delta=1e-12)
    assert got.flatten().tolist() == pytest.approx([0.75**0.5] * 2 + [-(0.75**0.5)] * 2, rel=1e-9)
    assert not advantages("reinforce_pp", rewards, reinforce_baseline="group").any()


@pytest.mark.parametrize("right", range(9))
def test_qae_has_two_regimes(right: int) -> None:
    # K = 0.4: with at most 60 % right only the right ones count, else only the wrong ones
    rewards = torch.tensor([[1.0] * right + [0.0] * (8 - right)])
    got = advantages("qae", rewards)[0]
    if right in (0, 8):
        assert not got.any()
    elif right / 8 <= 0.6:
        assert (got[:right] > 0).all() and not got[right:].any()
    else:
        assert not got[:right].any() and (got[right:] < 0).all()


def test_qae_interpolated_has_no_gate() -> None:
    rewards = torch.tensor([[1.0] * 5 + [0.0] * 3], dtype=torch.float64)
    got = advantages("qae", rewards, quantile_method="linear", advantage_delta=1e-12)[0]
    spread = oracle.std(rewards[0].tolist())
    assert got.tolist() == pytest.approx([0.2 / spread] * 5 + [-0.8 / spread] * 3)  # the baseline is 0.8
    assert torch.quantile(rewards, 0.4, dim=1).item() == pytest.approx(0.8)


def test_the_quantile_is_where_the_user_wrote_it() -> None:
    assert 0.28 * 25 > 7  # the trap: the 8th value of 25 instead of the 7th
    rewards = torch.arange(25, dtype=torch.float64)[None]
    assert advantages("qae", rewards, qae_quantile=0.28)[0, 6] == 0


def smoothed(visits: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64) -> Tensor:
    """dcpo at the last visit, after the history of the others."""
    history = RewardHistory()
    for visit in visits[:-1]:
        history.add([5], torch.tensor([visit], dtype=dtype))
    return advantages("dcpo", torch.tensor([visits[-1]], dtype=dtype), history.lookup([5]))[0]


VISITS = [
    [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]],
    [[0.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 0.0]],
    [[0.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4],
    [[0.3, 0.1, 5.0], [0.2, 0.2, 0.2], [0.1, -2.0, 0.4], [0.1, 0.2, 0.2]],
]


@pytest.mark.parametrize("visits", VISITS)
def test_dcpo_against_reference(visits: list[list[float]]) -> None:
    expected = torch.tensor(oracle.dcpo(visits, 1e-6), dtype=torch.float64)
    torch.testing.assert_close(smoothed(visits), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(smoothed(visits, torch.float32), expected.float(), rtol=1e-5, atol=1e-6)


def test_dcpo_by_hand() -> None:
    # visit 2: all right after a visit with 1 of 4; in all 5 of 8, variance 8 (5/8) (3/8) / 7 = 15/56
    total = (1 - 5 / 8) / (15 / 56) ** 0.5
    got = smoothed([[1.0, 0.0, 0.0, 0.0], [1.0] * 4])
    assert got.tolist() == pytest.approx([total / 2] * 4, rel=1e-5)
    # visit 3, all right again: 9 of 12, variance 12 (3/4) (1/4) / 11 = 9/44; A_new = 0, and 1/3 is less than 2/3
    total = (1 - 9 / 12) / (9 / 44) ** 0.5
    got = smoothed([[1.0, 0.0, 0.0, 0.0], [1.0] * 4, [1.0] * 4])
    assert got.tolist() == pytest.approx([total / 3] * 4, rel=1e-5)


def test_dcpo_rows_do_not_mix() -> None:
    history = RewardHistory()
    history.add([7, 3], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    rewards = torch.tensor([[0.5, 0.0], [1.0, 0.0]], dtype=torch.float64)
    got = advantages("dcpo", rewards, history.lookup([3, 7]))
    expected = [oracle.dcpo([[0.0, 0.0], [0.5, 0.0]], 1e-6), oracle.dcpo([[1.0, 0.0], [1.0, 0.0]], 1e-6)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_history_counts_visits_and_moments() -> None:
    history = RewardHistory()
    history.add([4, 9], torch.tensor([[1.0, 0.0, 1.0], [2.0, 2.0, 2.0]]))
    history.add([4], torch.tensor([[0.0, 0.0, 5.0]]))
    seen = history.lookup([9, 4, 1])
    values = [1.0, 0.0, 1.0, 0.0, 0.0, 5.0]
    assert seen.visits.tolist() == [1, 2, 0] and seen.count.tolist() == [3, 6, 0]
    assert seen.mean.tolist() == pytest.approx([2.0, oracle.mean(values), 0.0], rel=1e-12)
    assert seen.squares.tolist() == pytest.approx([0.0, 5 * oracle.std(values) ** 2, 0.0], rel=1e-12)


def test_a_prompt_may_stand_twice_in_a_batch() -> None:
    history = RewardHistory()
    history.add([4, 4], torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    seen = history.lookup([4])
    assert (seen.visits.item(), seen.count.item(), seen.mean.item()) == (2, 4, 0.75)


def test_the_history_survives_a_checkpoint() -> None:
    before = RewardHistory()
    before.add([123456, 0], torch.tensor([[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]))
    after = RewardHistory()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.state_dict() == before.state_dict()
    for one in (before, after):
        one.add([0], torch.tensor([[1.0, 1.0, 0.0]]))
    rewards = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    got = [advantages("dcpo", rewards, one.lookup([0, 123456])) for one in (before, after)]
    assert torch.equal(*got) and not torch.equal(
        got[0], advantages("dcpo", rewards, RewardHistory().lookup([0, 1]))
    )


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_other_dtypes_become_float32(name: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1, 0, 0], [1, 1, 0]])
    unseen = RewardHistory().lookup([0, 1])
    got = advantages(name, rewards.to(dtype), unseen)
    assert got.dtype == torch.float32 and torch.equal(got, advantages(name, rewards.float(), unseen))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_input_is_not_changed(name: str) -> None:
    rewards = torch.tensor(REWARDS)
    advantages(name, rewards)
    assert torch.equal(rewards, torch.tensor(REWARDS))


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("shape", [(3, 1), (4,), (3, 0)])
def test_a_group_needs_two(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"group of at least 2.*rollout\.group_size"):
        advantages(name, torch.zeros(shape))
