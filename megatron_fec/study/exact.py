"""The expected entropy change of one training step, without sampling: every action is tried with both signs of A.

Section 3 of arXiv 2602.09782 asks what each region of (A, ratio, p) does to entropy; here the answer is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fec.algorithm.schedules import build_schedule
from megatron_fec.algorithm.strategies import build_policy_loss
from megatron_fec.algorithm.thresholds import threshold_lines
from megatron_fec.config import AlgorithmConfig
from megatron_fec.seeds import derive_seed
from megatron_fec.study.tabular import peaked_logits, token_inputs

STATES, VOCABULARY = 64, 64
SPREAD = 3.0  # standard deviation of the logits of an open state
PEAK = 0.7, 0.995
OPEN_SHARE = 5  # one state of so many is open in the mixed family
FAMILIES = ("peaked", "mixed")
UPDATES, LEARNING_RATE = 8, 0.05


def make_states(family: str, seed: int) -> Tensor:
    """[STATES, VOCABULARY] fp64 logits: nearly certain ones, or those with one open state in five."""
    assert family in FAMILIES
    generator = torch.Generator().manual_seed(derive_seed(seed, "states"))
    peaked = peaked_logits(STATES, VOCABULARY, peak=PEAK, generator=generator)
    if family == "peaked":
        return peaked
    wide = SPREAD * torch.randn(STATES, VOCABULARY, generator=generator, dtype=torch.float64)
    is_open = torch.arange(STATES) % OPEN_SHARE == 0
    return torch.where(is_open[:, None], wide, peaked)


def entropy_change(
    logits: Tensor,
    algorithm: AlgorithmConfig,
    *,
    updates: int = UPDATES,
    learning_rate: float = LEARNING_RATE,
) -> float:
    """Mean over states of E[H after `updates` gradient steps on one sampled action] - H, nats.

    logits: [S, V] fp64. The action is drawn from the policy and A is +1 or -1 with equal chance; the expectation runs
    over all of them. The weights are the schedule's of step 0.
    """
    loss = build_policy_loss(algorithm.policy_loss, algorithm.options)
    lines = threshold_lines(algorithm.thresholds)
    before = _entropy(logits)
    weights = build_schedule(algorithm.schedule).weights(0, before.mean().item())
    num_states, vocabulary = logits.shape
    trial = logits[None, :, None, :].expand(
        2, num_states, vocabulary, vocabulary
    )  # sign, state, action: logits
    old_logprobs = trial.log_softmax(-1).diagonal(dim1=2, dim2=3)  # [2, S, V] of each action
    advantages = torch.tensor([1.0, -1.0], dtype=logits.dtype)[:, None, None].expand(old_logprobs.shape)
    for _ in range(updates):
        leaf = trial.detach().requires_grad_()
        logprobs = leaf.log_softmax(-1).diagonal(dim1=2, dim2=3)
        output = loss(token_inputs(logprobs, old_logprobs, advantages, weights, lines))
        (gradient,) = torch.autograd.grad(output.loss_sum, leaf)
        trial = trial - learning_rate * gradient
    change = _entropy(trial) - before[None, :, None]  # [2, S, V]
    return (old_logprobs.exp() * change).sum(-1).mean().item()


def _entropy(logits: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
