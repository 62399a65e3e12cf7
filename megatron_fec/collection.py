"""Responses and their rewards, the same on every rank; dynamic sampling draws more where all rewards are equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_fec.algorithm.reward_shaping import select_informative
from megatron_fec.config import RolloutConfig
from megatron_fec.rollout.engine import Engine, Sampling, check_groups
from megatron_fec.rollout.server_engine import ServerEngine
from megatron_fec.seeds import derive_seed
from megatron_fec.tasks.verifier import Handle, Verifier
from megatron_fec.types import Prompt, SampleGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """The groups of one step, with their rewards or the promise of them."""

    groups: list[SampleGroup]
    scoring: Handle | None  # of these groups; None where the rewards are known
    rewards: list[list[float]] | None  # a row a group
    drawn: int  # prompts taken from the order
    metrics: dict[str, float]  # what is known without rewards to come


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """A batch that is sampled before its step comes."""

    seed: int  # names the batch
    version: int  # of the weights that sample it
    groups: list[SampleGroup] | None  # None while the engine works


@dataclass(slots=True, kw_only=True)
class Collector:
    """Engine and verifier of a run; all methods are collective over the world."""

    engine: Engine
    verifier: Verifier
    settings: RolloutConfig
    ahead: Ahead | None = None

    def sample(
        self, prompts: Sequence[Prompt], *, group_size: int, version: int, seed: int
    ) -> list[SampleGroup]:
        """One group a prompt, of the weights `version`."""
        groups = self.engine.generate(prompts, self._sampling(group_size, seed))
        check_groups(groups, weight_version=version, group_size=group_size)
        return groups

    def start_ahead(self, prompts: Sequence[Prompt], *, version: int, seed: int) -> None:
        """Begins with the first batch of the coming step while the caller trains; its `collect` has this seed."""
        assert isinstance(self.engine, ServerEngine), "rollout.max_lag needs engines of their own"
        self.engine.start(prompts, self._sampling(self.settings.group_size, seed))
        self.ahead = Ahead(seed=seed, version=version, groups=None)

    def finish_ahead(self) -> None:
        """Waits for that batch, so that the engine is free for other weights."""
        if self.ahead is not None and self.ahead.groups is None:
            assert isinstance(self.engine, ServerEngine)
            self.ahead = replace(self.ahead, groups=self.engine.finish())

    def collect(self, draw: Callable[[int], list[Prompt]], *, version: int, seed: int) -> Collection:
        """A step's groups; draw(n) gives its n-th batch of prompts. Scoring goes on while the caller works.

        With settings.max_lag, the first batch may be one that was sampled ahead, by older weights.
        """
        if self.settings.max_refills:
            return self._with_signal(draw, version=version, seed=seed)
        groups = self._first_batch(draw, version=version, seed=seed)
        return Collection(
            groups=groups,
            scoring=self._start_scoring(groups),
            rewards=None,
            drawn=len(groups),
            metrics=self._engine_metrics(groups, version),
        )

    def rewards(self, collection: Collection) -> tuple[list[list[float]], dict[str, float]]:
        """Rewards of the collection's groups in order, and metrics of all that was sampled for it."""
        if collection.rewards is not None:
            return collection.rewards, collection.metrics
        assert collection.scoring is not None
        rewards, counts = self._finish_scoring(collection.scoring, len(collection.groups))
        return rewards, _metrics(collection.groups, rewards) | counts | collection.metrics

    def score(self, groups: Sequence[SampleGroup]) -> list[list[float]]:
        """Rewards of the groups in order."""
        return self._finish_scoring(self._start_scoring(groups), len(groups))[0]

    def _with_signal(self, draw: Callable[[int], list[Prompt]], *, version: int, seed: int) -> Collection:
        """Dynamic sampling of DAPO, arXiv 2503.14476, section 3.2: groups whose rewards are not all equal.

        After settings.max_refills more batches the places that are left go to groups without signal, in the order
        they came.
        """
        groups: list[SampleGroup] = []
        rewards: list[list[float]] = []
        failed: dict[str, float] = {}
        has_signal: list[bool] = []
        wanted, batches = self.settings.prompts_per_step, 0
        while sum(has_signal) < wanted and batches <= self.settings.max_refills:
            if batches == 0:  # it has the seed of a run without refills
                more = self._first_batch(draw, version=version, seed=seed)
            else:
                more = self.sample(
                    draw(batches),
                    group_size=self.settings.group_size,
                    version=version,
                    seed=derive_seed(seed, "refill", batches),
                )
            scores, counts = self._finish_scoring(self._start_scoring(more), len(more))
            groups, rewards = groups + more, rewards + scores
            has_signal = select_informative(torch.tensor(rewards)).tolist()
            failed = {name: failed.get(name, 0.0) + value for name, value in counts.items()}
            batches += 1
        # A stable sort: those with signal first, each kind in the order it came.
        chosen = sorted(sorted(range(len(groups)), key=lambda i: not has_signal[i])[:wanted])
        return Collection(
            groups=[groups[i] for i in chosen],
            scoring=None,
            rewards=[rewards[i] for i in chosen],
            drawn=len(groups),
            metrics=_metrics(groups, rewards)
            | failed
            | self._engine_metrics([groups[i] for i in chosen], version)
            | {
                "refills": float(batches - 1),
                "without_signal": sum(not has_signal[i] for i in chosen) / wanted,
            },
        )

    def _first_batch(
        self, draw: Callable[[int], list[Prompt]], *, version: int, seed: int
    ) -> list[SampleGroup]:
        """The batch that was sampled ahead, if it is this step's; else one of the current weights."""
        self.finish_ahead()
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead.seed != seed:
            return self.sample(draw(0), group_size=self.settings.group_size, version=version, seed=seed)
        assert ahead.groups is not None
        check_groups(
            ahead.groups,
            weight_version=version,
            group_size=self.settings.group_size,
            max_lag=self.settings.max_lag,
        )
        return ahead.groups

    def _sampling(self, group_size: int, seed: int) -> Sampling:
        return Sampling(
            group_size=group_size,
            max_response_tokens=self.settings.max_response_tokens,
            temperature=self.settings.temperature,
            seed=seed,
        )

    def _engine_metrics(self, groups: Sequence[SampleGroup], version: int) -> dict[str, float]:
        """How old the weights were that sampled, in steps, and what befell the engines."""
        lags = [version - sample.weight_version for group in groups for sample in group.samples]
        counts = self.engine.counts() if isinstance(self.engine, ServerEngine) else {}
        return {"lag": sum(lags) / len(lags), **counts}

    def _start_scoring(self, groups: Sequence[SampleGroup]) -> Handle:
        """Begins with this rank's share: every world-size-th group."""
        return self.verifier.start_step(list(groups[dist.get_rank() :: dist.get_world_size()]))

    def _finish_scoring(self, scoring: Handle, num_groups: int) -> tuple[list[list[float]], dict[str, float]]:
        """Rewards of all groups in order, and counts of failed verdicts."""
        result = self.verifier.finish_step(scoring)
        shares: list = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (result.rewards, result.timeouts, result.crashes))
        rewards = [shares[i % len(shares)][0][i // len(shares)] for i in range(num_groups)]
        return rewards, {
            "verifier_timeouts": float(sum(s[1] for s in shares)),
            "verifier_crashes": float(sum(s[2] for s in shares)),
        }


def _metrics(groups: Sequence[SampleGroup], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over the samples or the groups."""
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.token_ids) for sample in samples]
    flat = [reward for group in rewards for reward in group]
    return {
        "reward": sum(flat) / len(flat),
        "group_pass_rate": sum(max(group) > 0 for group in rewards) / len(rewards),
        "group_signal_rate": sum(min(group) < max(group) for group in rewards) / len(rewards),
        "response_length": sum(lengths) / len(lengths),
        "response_tokens": float(sum(lengths)),
        "truncated": sum(sample.is_truncated for sample in samples) / len(samples),
    }
