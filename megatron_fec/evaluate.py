"""mean@k and unbiased pass@k of sampled responses."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k={k} must be between 1 and the {num_samples} samples of a prompt. Sample more or lower k."
        )
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def evaluation_metrics(rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """mean_at_k/N over N samples a prompt, and pass_at_k/K for the powers of two K up to N.

    rewards: one list a prompt, all of one length N. A response is right when its reward is above 0.
    """
    num_samples = len(rewards[0])
    right = [sum(reward > 0 for reward in group) for group in rewards]
    metrics = {f"mean_at_k/{num_samples}": sum(right) / (num_samples * len(right))}
    k = 1
    while k <= num_samples:
        metrics[f"pass_at_k/{k}"] = sum(pass_at_k(num_samples, c, k) for c in right) / len(right)
        k *= 2
    return metrics
