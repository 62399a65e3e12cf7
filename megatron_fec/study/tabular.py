"""An exact bandit: a softmax policy whose logits are the parameters, so entropy, reward and pass@k need no sampling.

It is trained with this project's own schedules, thresholds, losses and advantages in float64; only the policy, the task
and the optimizer (plain gradient steps) are made here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fec.algorithm.schedules import build_schedule
from megatron_fec.algorithm.strategies import build_advantage, build_policy_loss
from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds, threshold_lines
from megatron_fec.config import AlgorithmConfig
from megatron_fec.metrics import MetricSums
from megatron_fec.run_log import Row
from megatron_fec.seeds import derive_seed
from megatron_fec.types import BlendWeights, LossInputs, LossOutput

STATES, POSITIONS, VOCABULARY = 256, 10, 64
KEYS, FORKS = (
    2,
    2,
)  # positions that decide about the reward / that have entropy and decide nothing; the rest is peaked
SPREAD = 4.0  # standard deviation of the logits of keys and forks
RIGHT = 0.3  # chance that a random answer is right
PEAK = 0.85, 0.995  # probability of the first word of a peaked position; the others have a Zipf tail
LUCK = 0.5  # share of right answers that are rewarded, so that the reward keeps its noise
PASS_AT = (1, 8, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandit:
    """A policy over answers of L words, each word drawn by itself, and which answers are right."""

    logits: Tensor  # [S, L, V] fp64
    is_right: Tensor  # [S, KEYS, V] bool; an answer is right when all its key words are


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """One training step: prompts_per_step states, group_size answers each, `updates` gradient steps on all of them."""

    prompts_per_step: int = 32
    group_size: int = 8
    updates: int = 16
    learning_rate: float = 0.15


def make_bandit(seed: int) -> Bandit:
    """States of a language model's shape: few words decide, most positions are nearly certain."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "bandit"))
    open_positions = KEYS + FORKS
    logits = SPREAD * torch.randn(
        STATES, open_positions, VOCABULARY, generator=generator, dtype=torch.float64
    )
    peaked = peaked_logits(STATES * (POSITIONS - open_positions), VOCABULARY, peak=PEAK, generator=generator)
    is_right = torch.rand(STATES, KEYS, VOCABULARY, generator=generator) < RIGHT ** (1 / KEYS)
    one_right = torch.randint(VOCABULARY, (STATES, KEYS, 1), generator=generator)
    return Bandit(
        logits=torch.cat([logits, peaked.view(STATES, -1, VOCABULARY)], 1),
        is_right=is_right.scatter(2, one_right, True),
    )


def peaked_logits(
    num_states: int, vocabulary: int, *, peak: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """[num_states, vocabulary] fp64: one word of probability within `peak`, a Zipf tail over the others, shuffled.

    What the first word leaves is uniform in its logarithm.
    """
    low, high = math.log(1 - peak[1]), math.log(1 - peak[0])
    rest = (low + (high - low) * torch.rand(num_states, 1, generator=generator, dtype=torch.float64)).exp()
    rank = torch.rand(num_states, vocabulary, generator=generator).argsort(-1).argsort(-1).double()
    tail = torch.where(rank == 0, 0.0, 1 / rank.clamp(min=1))
    return torch.where(rank == 0, 1 - rest, tail / tail.sum(-1, keepdim=True) * rest).log()


def mean_entropy(logits: Tensor) -> float:
    """Nats per word, averaged over states and positions."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1).mean().item()


def right_chance(bandit: Bandit) -> Tensor:
    """[S] chance that an answer is right."""
    probs = bandit.logits[:, : bandit.is_right.shape[1]].softmax(-1)
    return (probs * bandit.is_right).sum(-1).prod(1)


def exact_metrics(bandit: Bandit) -> dict[str, float]:
    """What the trainer estimates from samples, under its names; the reward is the chance to be right."""
    chance = right_chance(bandit)
    return {
        "train_rollouts/entropy": mean_entropy(bandit.logits),
        "train_rollouts/reward": chance.mean().item(),
        **{f"val_rollouts/pass_at_k/{k}": (1 - (1 - chance) ** k).mean().item() for k in PASS_AT},
    }


def train_bandit(
    bandit: Bandit,
    algorithm: AlgorithmConfig,
    *,
    num_steps: int,
    seed: int,
    is_random_reward: bool = False,
    steps: Steps | None = None,
) -> list[Row]:
    """One row a step in the format of metrics.jsonl, and a last row with what num_steps steps led to.

    is_random_reward: a coin in place of the task, the case of arXiv 2509.26114. The schedule gets the exact entropy.
    """
    steps = steps or Steps()
    generator = torch.Generator().manual_seed(derive_seed(seed, "bandit training"))
    schedule = build_schedule(algorithm.schedule)
    advantage = build_advantage(algorithm.advantage, algorithm.options)
    logits, rows = bandit.logits, []
    for step in range(num_steps):
        metrics = exact_metrics(Bandit(logits=logits, is_right=bandit.is_right))
        weights = schedule.weights(step, metrics["train_rollouts/entropy"])
        states = torch.randperm(len(logits), generator=generator)[: steps.prompts_per_step]
        actions = _sample(logits[states], steps.group_size, generator)
        rewards = _rewards(bandit.is_right[states], actions, is_random_reward, generator)
        updated, sums = _update(logits[states], actions, advantage(rewards, None), algorithm, weights, steps)
        logits = logits.index_copy(0, states, updated)
        optim = sums.means() | {"weight_upper": weights.upper, "weight_lower": weights.lower}
        optim |= schedule.metrics()
        rows.append({"step": step, **metrics, **{f"train_optim/{name}": v for name, v in optim.items()}})
    last = exact_metrics(Bandit(logits=logits, is_right=bandit.is_right))
    return [*rows, {"step": num_steps, **last}]


def token_inputs(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: BlendWeights, lines: ThresholdLines
) -> LossInputs:
    """Loss inputs of tokens that are all response; any one shape, flattened."""
    flat = logprobs.reshape(-1)
    return LossInputs(
        logprobs=flat,
        old_logprobs=old_logprobs.reshape(-1),
        advantages=advantages.reshape(-1),
        response_mask=torch.ones_like(flat, dtype=torch.bool),
        bounds=clip_bounds(flat.detach().exp(), weights, lines=lines),
    )


def _sample(logits: Tensor, group_size: int, generator: torch.Generator) -> Tensor:
    """[B, L, G] words."""
    probs = logits.softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(probs, group_size, replacement=True, generator=generator)
    return drawn.view(*logits.shape[:2], group_size)


def _rewards(is_right: Tensor, actions: Tensor, is_random: bool, generator: torch.Generator) -> Tensor:
    """[B, G] fp64 of 0 and 1."""
    keys = is_right.shape[1]
    right = is_right.gather(2, actions[:, :keys]).all(1).double()
    coin = (torch.rand(right.shape, generator=generator) < LUCK).double()
    return coin if is_random else right * coin


def _update(
    logits: Tensor,
    actions: Tensor,
    advantages: Tensor,
    algorithm: AlgorithmConfig,
    weights: BlendWeights,
    steps: Steps,
) -> tuple[Tensor, MetricSums]:
    """The logits [B, L, V] after the step's updates, and the loss's own metrics.

    The gradient is that of the sum over words, divided by the group size: states do not share parameters, so a mean
    over all words would only rescale the learning rate.
    """
    loss = build_policy_loss(algorithm.policy_loss, algorithm.options)
    lines = threshold_lines(algorithm.thresholds)
    old_logprobs = logits.log_softmax(-1).gather(2, actions)
    per_word = advantages[:, None, :].expand(old_logprobs.shape)
    metrics: list[MetricSums] = []
    for _ in range(steps.updates):
        leaf = logits.detach().requires_grad_()
        logprobs = leaf.log_softmax(-1).gather(2, actions)
        output: LossOutput = loss(token_inputs(logprobs, old_logprobs, per_word, weights, lines))
        (gradient,) = torch.autograd.grad(output.loss_sum, leaf)
        logits = logits - steps.learning_rate / steps.group_size * gradient
        metrics.append(output.metrics)
    return logits, sum(metrics[1:], metrics[0])
