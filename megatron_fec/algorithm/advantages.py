"""Advantages: how much better a response is than its siblings."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, delta: float = 1e-6) -> Tensor:
    """GRPO advantages (R - mean) / (std + delta) within each group, arXiv 2402.03300.

    rewards: [P, G], one row a prompt. std is the unbiased one. A group of equal rewards gives exactly 0.
    Returns [P, G] in fp32, or fp64 for fp64 rewards.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards of shape {list(rewards.shape)} must be [prompts, group] with a group of at least 2: "
            "an advantage compares the responses of one prompt. Raise rollout.group_size."
        )
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + delta)
    # The mean of equal rewards is rounded, and dividing that error by delta would make it 1e-2.
    is_constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(is_constant, 0.0, advantages)
