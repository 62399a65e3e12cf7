"""The bandit and the exact step against brute force and hand-written steps, and what they must show of entropy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_fec.config import AlgorithmConfig
from megatron_fec.study import exact, tabular
from megatron_fec.study.tabular import Bandit, Steps, exact_metrics, make_bandit, train_bandit
from megatron_fec.study.units import Unit, configuration

ENTROPY, REWARD = "train_rollouts/entropy", "train_rollouts/reward"


def algorithm(bed: str, variant: str, steps: int = 1) -> AlgorithmConfig:
    return configuration(Unit(bed=bed, variant=variant, seed=0, steps=steps)).algorithm


def tiny_bandit(positions: int = 3) -> Bandit:
    """Two states, three words; the first two positions decide."""
    generator = torch.Generator().manual_seed(5)
    return Bandit(
        logits=2 * torch.randn(2, positions, 3, generator=generator, dtype=torch.float64),
        is_right=torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=torch.bool),
    )


def test_exact_metrics_against_all_answers() -> None:
    bandit = tiny_bandit()
    entropies, chances = [], []
    for logits, is_right in zip(bandit.logits.tolist(), bandit.is_right.tolist(), strict=True):
        words = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits]
        entropy = right = 0.0
        for answer in itertools.product(range(3), repeat=3):
            p = math.prod(row[word] for row, word in zip(words, answer, strict=True))
            entropy -= p * math.log(p)
            right += p if is_right[0][answer[0]] and is_right[1][answer[1]] else 0.0
        entropies.append(entropy / 3)  # of an answer is the sum over its words
        chances.append(right)
    metrics = exact_metrics(bandit)
    assert metrics[ENTROPY] == pytest.approx(sum(entropies) / 2, abs=1e-14)
    assert metrics[REWARD] == pytest.approx(sum(chances) / 2, abs=1e-14)
    for k in tabular.PASS_AT:
        missed = [math.prod([1 - chance] * k) for chance in chances]
        assert metrics[f"val_rollouts/pass_at_k/{k}"] == pytest.approx(1 - sum(missed) / 2, abs=1e-14)


def test_pass_at_2_against_all_pairs_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabular, "PASS_AT", (2,))
    bandit = tiny_bandit(positions=2)
    found = 0.0
    for logits, is_right in zip(bandit.logits, bandit.is_right, strict=True):
        p = (logits[0].softmax(-1)[:, None] * logits[1].softmax(-1)[None]).flatten().tolist()
        right = (is_right[0][:, None] & is_right[1][None]).flatten().tolist()
        for a, b in itertools.product(range(9), repeat=2):
            found += p[a] * p[b] * (right[a] or right[b]) / 2
    assert exact_metrics(bandit)["val_rollouts/pass_at_k/2"] == pytest.approx(found, abs=1e-14)


def hand_step(
    logits: list[float],
    words: list[int],
    advantages: list[float],
    old: list[float],
    eps: tuple[float, float],
    rate: float,
) -> list[float]:
    """One gradient step of a position under GRPO's objective, from the formulas; rate is per answer."""
    total = sum(map(math.exp, logits))
    p = [math.exp(z) / total for z in logits]
    updated = list(logits)
    for word, advantage, before in zip(words, advantages, old, strict=True):
        ratio = p[word] / before
        is_clipped = (advantage > 0 and ratio > 1 + eps[1]) or (advantage < 0 and ratio < 1 - eps[0])
        weight = 0.0 if is_clipped else advantage * ratio
        for x in range(len(logits)):
            updated[x] += rate * weight * ((x == word) - p[x])
    return updated


def test_training_makes_the_hand_written_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    update = tabular._update

    def spy(logits: Tensor, actions: Tensor, advantages: Tensor, *rest: object) -> object:
        seen.append((logits, actions, advantages))
        return update(logits, actions, advantages, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tabular, "_update", spy)
    steps = Steps(prompts_per_step=2, group_size=4, updates=5, learning_rate=1.5)
    rows = train_bandit(
        tiny_bandit(),
        algorithm("tabular", "clip_higher"),
        num_steps=1,
        seed=3,
        steps=steps,
        is_random_reward=True,
    )
    ((logits, actions, advantages),) = seen
    assert advantages.abs().sum() > 0
    expected = []
    for b, position in itertools.product(range(2), range(3)):
        z, words = logits[b, position].tolist(), actions[b, position].tolist()
        old = [math.exp(z[word]) / sum(map(math.exp, z)) for word in words]
        for _ in range(5):
            z = hand_step(z, words, advantages[b].tolist(), old, (0.2, 0.28), 1.5 / 4)
        expected.append(z)
    after = torch.tensor(expected, dtype=torch.float64)
    entropy = -(after.softmax(-1) * after.log_softmax(-1)).sum(-1).mean().item()
    assert rows[0]["train_optim/clip_fraction_upper"] > 0 < rows[0]["train_optim/clip_fraction_lower"]
    assert rows[1][ENTROPY] == pytest.approx(entropy, abs=1e-12)


def test_rewards_are_the_task_with_luck_or_a_coin() -> None:
    generator = torch.Generator().manual_seed(0)
    is_right = torch.zeros(400, 2, 3, dtype=torch.bool)
    is_right[:, :, 0] = True
    actions = torch.randint(3, (400, 4, 8), generator=generator)
    right = (actions[:, :2] == 0).all(1)
    rewards = tabular._rewards(is_right, actions, False, generator)
    assert not rewards[~right].any() and 0.4 < rewards[right].mean() < 0.6
    coin = tabular._rewards(is_right, actions, True, generator)
    assert 0.45 < coin[~right].mean() < 0.55


def test_a_bandit_has_the_stated_shape() -> None:
    bandit = make_bandit(1)
    probs = bandit.logits.softmax(-1)
    assert probs.shape == (256, 10, 64) and probs.dtype == torch.float64
    top = probs[:, 4:].max(-1).values
    assert top.min() >= 0.85 and top.max() <= 0.995
    assert bandit.is_right.any(-1).all() and 0.4 < bandit.is_right.double().mean() < 0.7
    assert torch.equal(bandit.logits, make_bandit(1).logits) and not torch.equal(
        bandit.logits, make_bandit(2).logits
    )


def hand_entropy_change(logits: list[float], updates: int, rate: float) -> float:
    """Of one state, under GRPO."""
    p = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
    change = 0.0
    for word, advantage in itertools.product(range(len(p)), (1.0, -1.0)):
        z = list(logits)
        for _ in range(updates):
            z = hand_step(z, [word], [advantage], [p[word]], (0.2, 0.2), rate)
        q = [math.exp(x) / sum(map(math.exp, z)) for x in z]
        change += p[word] / 2 * (sum(x * math.log(x) for x in p) - sum(x * math.log(x) for x in q))
    return change


def test_the_exact_entropy_change_against_one_step_after_the_other() -> None:
    logits = 2 * torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = sum(hand_entropy_change(row, 6, 0.3) for row in logits.tolist()) / 2
    got = exact.entropy_change(logits, algorithm("exact", "grpo"), updates=6, learning_rate=0.3)
    assert got == pytest.approx(expected, abs=1e-14) and abs(got) > 1e-4


@pytest.mark.parametrize("family", exact.FAMILIES)
def test_signs_of_the_rules_and_the_regions(family: str) -> None:
    states = exact.make_states(family, 0)
    change = {
        variant: exact.entropy_change(states, algorithm("exact", variant))
        for variant in ("grpo", "dynamic_upper", "dynamic_lower", "closed_upper", "closed_lower")
    }
    assert change["dynamic_upper"] - change["grpo"] > 1e-3
    assert change["dynamic_lower"] - change["grpo"] < -1e-3
    for region, base, sign in (
        ("E1", "closed_upper", -1),
        ("E2", "closed_upper", 1),
        ("E3", "closed_lower", 1),
        ("E4", "closed_lower", -1),
    ):
        kept = exact.entropy_change(states, algorithm("exact", f"only_{region}"))
        assert sign * (kept - change[base]) > 1e-3, region


def test_with_one_update_all_rules_are_one() -> None:
    states = exact.make_states("mixed", 0)
    variants = ("grpo", "clip_higher", "dynamic_upper", "dynamic_lower")
    changes = {
        exact.entropy_change(states, algorithm("exact", v), updates=1, learning_rate=0.4) for v in variants
    }
    assert len(changes) == 1
    steps = Steps(updates=1)
    ends = {
        train_bandit(make_bandit(0), algorithm("tabular", v, 5), num_steps=5, seed=0, steps=steps)[-1][
            ENTROPY
        ]
        for v in variants
    }
    assert len(ends) == 1


@pytest.mark.parametrize("is_random", [True, False])
def test_training_shows_what_the_rules_do(is_random: bool) -> None:
    variants = ("grpo", "dynamic_upper", "dynamic_lower")
    first, last = {}, {}
    for variant in variants:
        rows = train_bandit(
            make_bandit(0),
            algorithm("tabular", variant, 60),
            num_steps=60,
            seed=0,
            is_random_reward=is_random,
        )
        first[variant], last[variant] = rows[0], rows[-1]
    assert len({row[ENTROPY] for row in first.values()}) == 1
    assert last["grpo"][ENTROPY] < first["grpo"][ENTROPY] - 0.015
    assert last["dynamic_upper"][ENTROPY] - last["grpo"][ENTROPY] > 0.02
    assert last["dynamic_lower"][ENTROPY] - last["grpo"][ENTROPY] < -0.01
    assert last["dynamic_upper"][REWARD] >= last["grpo"][REWARD] - 0.02
