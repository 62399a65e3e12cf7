"""Advantages: how much better a response is than its siblings, or than what is usual for its prompt or batch.

Each is f(rewards [P, G], history, *, options) -> [P, G], one row a prompt, in fp32, or fp64 for fp64 rewards. `history` is
what was seen of the prompts before this step; only dcpo looks at it. std is the unbiased one throughout. A group of
equal rewards gets exactly 0, except where the baseline is not the group's own (reinforce_pp, dcpo).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_fec.algorithm.options import Inside, Positive
from megatron_fec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHistory:
    """The rewards of each prompt at all earlier visits; [P] fp64 tensors, all 0 for a prompt never seen."""

    visits: Tensor
    count: Tensor  # rewards
    mean: Tensor
    squares: Tensor  # sum of (reward - mean)^2


class RewardHistory:
    """What a run remembers of the rewards of every prompt."""

    def __init__(self) -> None:
        self._rows: dict[int, list[float]] = {}  # prompt id -> [visits, count, mean, squares]

    def lookup(self, prompt_ids: Sequence[int]) -> GroupHistory:
        """The prompts' rows, in the order of prompt_ids."""
        rows = [self._rows.get(i, [0.0] * 4) for i in prompt_ids]
        visits, count, mean, squares = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).unbind(1)
        return GroupHistory(visits=visits, count=count, mean=mean, squares=squares)

    def add(self, prompt_ids: Sequence[int], rewards: Tensor) -> None:
        """One more visit of each prompt; rewards: [P, G], of the same kind as those that the advantages saw."""
        for i, row in zip(prompt_ids, rewards, strict=True):  # one by one: a batch may hold a prompt twice
            seen = _merged(self.lookup([i]), row[None])
            self._rows[i] = [x.item() for x in (seen.visits, seen.count, seen.mean, seen.squares)]

    def state_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"prompts": [[i, *row] for i, row in self._rows.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = {i: row for i, *row in state["prompts"]}


def group_advantages(
    rewards: Tensor, history: GroupHistory | None = None, *, advantage_delta: Positive = 1e-6
) -> Tensor:
    """GRPO: (R - mean) / (std + delta) within each group, arXiv 2402.03300."""
    rewards = _checked(rewards)
    return _deviations(rewards) / (rewards.std(1, keepdim=True) + advantage_delta)


def dr_grpo(rewards: Tensor, history: GroupHistory | None = None) -> Tensor:
    """Dr. GRPO: R - mean of the group, arXiv 2503.20783, section 3.2: no std, which weighs easy and hard prompts more.

    Its other half, a sum over tokens with a constant divisor, is algorithm.aggregation=seq_mean_token_sum_norm.
    """
    return _deviations(_checked(rewards))


def rloo(rewards: Tensor, history: GroupHistory | None = None) -> Tensor:
    """RLOO: R - mean of the other responses of the group, arXiv 2402.14740, as G / (G - 1) (R - mean)."""
    rewards = _checked(rewards)
    return _deviations(rewards) * (rewards.shape[1] / (rewards.shape[1] - 1))


def reinforce_pp(
    rewards: Tensor,
    history: GroupHistory | None = None,
    *,
    reinforce_baseline: Literal["batch", "group"] = "batch",
    advantage_delta: Positive = 1e-6,
) -> Tensor:
    """REINFORCE++: (R - mean) / (std + delta) over the whole batch, arXiv 2501.03262.

    reinforce_baseline=group is its variant "w/ baseline": R - mean of the group, over the batch's std of these; here
    groups of equal rewards get 0. Departures: a response counts once, not once a token as in verl; no KL in the reward.
    """
    rewards = _checked(rewards)
    if reinforce_baseline == "batch":
        deviations = _deviations(rewards.reshape(1, -1)).view_as(rewards)
    else:
        deviations = _deviations(rewards)  # of mean 0 over the batch, too
    std = (deviations.square().sum() / (deviations.numel() - 1)).sqrt()
    return deviations / (std + advantage_delta)


def qae(
    rewards: Tensor,
    history: GroupHistory | None = None,
    *,
    qae_quantile: Inside = 0.4,
    quantile_method: Literal["inverted_cdf", "linear"] = "inverted_cdf",
    advantage_delta: Positive = 1e-6,
) -> Tensor:
    """QAE: (R - K-quantile of the group) / (std + delta), arXiv 2509.22611.

    With rewards of 0 and 1, inverted_cdf gives the paper's gate: the baseline is 0 where at most 1 - K of the responses are
    right, else 1, so that only the rare kind gets an advantage. linear interpolates, as torch.quantile and the
    authors' code do, and has no such gate.
    """
    rewards = _checked(rewards)
    ordered = rewards.sort(1).values
    quantile, size = Fraction(str(qae_quantile)), rewards.shape[1]  # in floats, 0.28 * 25 > 7
    if quantile_method == "inverted_cdf":
        baseline = ordered[:, math.ceil(quantile * size) - 1]
    else:
        at = quantile * (size - 1)
        left = math.floor(at)
        baseline = torch.lerp(ordered[:, left], ordered[:, left + 1], float(at - left))
    return (rewards - baseline[:, None]) / (rewards.std(1, keepdim=True) + advantage_delta)


def dcpo(rewards: Tensor, history: GroupHistory, *, advantage_delta: Positive = 1e-6) -> Tensor:
    """Smooth advantage standardisation of DCPO, arXiv 2509.02333, section 3.2.

    At the i-th visit of a prompt, with A_new = (R - mean) / (std + delta) over this group and A_total the same over all
    rewards of the prompt so far, this group's included: (i - 1) / i A_new + 1 / i A_total and the same with A_new and
    A_total exchanged; of the two, the one nearer to 0. The first visit is GRPO. Groups of equal rewards get A_total / i.
    Departure: the std of A_total is that of all rewards; the authors' code averages the variances of the visits.
    """
    rewards = _checked(rewards)
    exact = rewards.double()
    total = _merged(history, exact)
    std = (total.squares / (total.count - 1)).sqrt()
    a_total = (exact - total.mean[:, None]) / (std[:, None] + advantage_delta)
    a_new = group_advantages(exact, advantage_delta=advantage_delta)
    share = 1 / total.visits[:, None]
    near_new = (1 - share) * a_new + share * a_total
    near_total = share * a_new + (1 - share) * a_total
    return torch.where(near_new.abs() < near_total.abs(), near_new, near_total).to(rewards.dtype)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": group_advantages,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "qae": qae,
    "dcpo": dcpo,
}


def _checked(rewards: Tensor) -> Tensor:
    """The rewards as fp32, or fp64 where they are."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ConfigError(
            f"rewards of shape {list(rewards.shape)} must be [prompts, group] with a group of at least 2: "
            "an advantage compares the responses of one prompt. Raise rollout.group_size."
        )
    return rewards if rewards.dtype == torch.float64 else rewards.float()


def _deviations(rewards: Tensor) -> Tensor:
    """R - mean of each row; exactly 0 in a row of equal rewards.

    There the mean is rounded, and dividing that error by delta would make it 1e-2.
    """
    is_constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(is_constant, 0.0, rewards - rewards.mean(1, keepdim=True))


def _merged(history: GroupHistory, rewards: Tensor) -> GroupHistory:
    """The history with one more visit, rewards [P, G]; by means and squared deviations, which do not cancel as sums do."""
    rewards = rewards.double()
    deviations = _deviations(rewards)
    mean = rewards[:, 0] - deviations[:, 0]  # exact where all are equal
    size = rewards.shape[1]
    count = history.count + size
    gap = mean - history.mean
    return GroupHistory(
        visits=history.visits + 1,
        count=count,
        mean=history.mean + gap * (size / count),  # at the first visit the mean itself
        squares=history.squares + deviations.square().sum(1) + gap.square() * history.count * size / count,
    )
