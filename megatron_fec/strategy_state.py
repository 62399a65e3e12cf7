"""What the chosen strategies make of a step's rewards, and what they remember from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fec.algorithm.advantages import RewardHistory
from megatron_fec.algorithm.strategies import (
    adaptive_entropy,
    build_advantage,
    build_reward_shaping,
    needs_history,
)
from megatron_fec.config import AlgorithmConfig, ConfigError
from megatron_fec.types import SampleGroup


class StrategyState:
    """The same on every rank: all of it follows from numbers that all ranks have."""

    def __init__(self, algorithm: AlgorithmConfig, *, max_response_tokens: int) -> None:
        name, options = algorithm.advantage, algorithm.options
        self._shaped = build_reward_shaping(name, options, max_response_tokens=max_response_tokens)
        self._advantages = build_advantage(name, options)
        self._adaptive = adaptive_entropy(algorithm)
        self._history = RewardHistory() if needs_history(name) else None
        # What a resumed run must share, beside the state itself.
        self._names = {key: getattr(algorithm, key) for key in ("policy_loss", "advantage", "aggregation")}
        self._entropy: float | None = None  # of the step before
        self._entropy_change: float | None = None

    def sample_values(
        self, groups: Sequence[SampleGroup], rewards: Sequence[Sequence[float]], entropy: float
    ) -> dict[str, Tensor]:
        """Fields of MicroBatch, [P, G] each; called once a step. entropy: token mean of the policy that sampled."""
        self._entropy_change = None if self._entropy is None else entropy - self._entropy
        self._entropy = entropy
        scores = torch.tensor(rewards)
        lengths = torch.tensor([[len(sample.token_ids) for sample in group.samples] for group in groups])
        prompt_ids = [group.prompt.prompt_id for group in groups]
        history = None if self._history is None else self._history.lookup(prompt_ids)
        shaped = self._shaped(scores, lengths)
        values = {"advantages": self._advantages(shaped, history)}
        if self._history is not None:
            self._history.add(prompt_ids, shaped)
        if self._adaptive is not None:
            coefs = self._adaptive.coefs(entropy, (scores > 0).float().mean(1))
            values["entropy_coefs"] = coefs[:, None].expand_as(scores)
        return values

    def metrics(self) -> dict[str, float]:
        """entropy_change: what the step before did to the entropy, measured on this step's rollouts."""
        return {} if self._entropy_change is None else {"entropy_change": self._entropy_change}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON types."""
        parts = {"adaptive_entropy": self._adaptive, "reward_history": self._history}
        return {"names": self._names, "entropy": self._entropy} | {
            k: p.state_dict() for k, p in parts.items() if p is not None
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            raise ConfigError(
                "the checkpoint holds no state of its strategies: an older release wrote it. Convert it with "
                "megatron-fec convert, and start a new trainer.run_dir from the result."
            )
        for key, value in self._names.items():
            if state["names"][key] != value:
                raise ConfigError(
                    f"algorithm.{key}={value}, but the checkpoint was saved under {state['names'][key]}. Set it to that, "
                    "or use another trainer.run_dir."
                )
        self._entropy = state["entropy"]
        if self._adaptive is not None:
            self._adaptive.load_state_dict(state["adaptive_entropy"])
        if self._history is not None:
            self._history.load_state_dict(state["reward_history"])
