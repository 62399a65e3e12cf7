"""The reinforcement loop, in NeMo-Aligner's shape and SPMD: every rank runs every line.

Memory moves in prepare_for_* and finish_* only: the engine sleeps while the policy trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fec.algorithm.advantages import group_advantages
from megatron_fec.algorithm.schedules import Schedule
from megatron_fec.config import Config, ConfigError
from megatron_fec.evaluate import evaluation_metrics
from megatron_fec.metrics import MetricSums
from megatron_fec.policy.checkpoint import TrainerState, load_checkpoint, save_checkpoint
from megatron_fec.policy.device import device, release_cached_memory
from megatron_fec.policy.step import Policy, compute_logprobs, reduce_metrics, train_update
from megatron_fec.policy.weights import hf_weights
from megatron_fec.rollout.engine import Engine, Sampling, check_groups
from megatron_fec.rollout.packing import PackLayout, pack, with_advantages
from megatron_fec.run_log import TOKENS_PER_SECOND, RunLog, Timers
from megatron_fec.seeds import derive_seed
from megatron_fec.tasks.prompts import PromptOrder
from megatron_fec.tasks.verifier import Verifier
from megatron_fec.token_loss import policy_token_loss
from megatron_fec.types import (
    BlendWeights,
    MicroBatch,
    Prompt,
    SampleGroup,
)

KERNEL_NOISE = (
    1e-3  # largest mean |log ratio| before the first update: the same weights through the same kernel
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """One step's training data; micro-batches are this rank's, all else is the same on every rank."""

    updates: list[list[MicroBatch]]  # old_logprobs and advantages filled
    entropy: float  # token mean of the policy that sampled, nats
    metrics: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Trainer:
    config: Config
    policy: Policy
    engine: Engine
    schedule: Schedule
    verifier: Verifier
    train_prompts: Sequence[Prompt]
    validation_prompts: Sequence[Prompt]
    log: RunLog
    pack_layout: PackLayout
    state: TrainerState
    timers: Timers = field(default_factory=Timers)
    engine_version: int | None = None  # of the weights in the engine
    is_first_update: bool = True  # of this process

    def fit(self) -> None:
        """Steps until trainer.max_steps: sample, score, log-probs, schedule, updates, log, save and evaluate when due."""
        settings = self.config.trainer
        while self.state.step < settings.max_steps:
            step = self.state.step
            self.timers.reset()
            with self.timers("step"):
                rollouts = self.generate_rollouts(step)
                weights = self.schedule.weights(step, rollouts.entropy)
                optim_metrics = self.run_training(rollouts, weights, step)
                self.state = self._advanced()
            metrics = rollouts.metrics | optim_metrics
            if settings.eval_every and _is_due(settings.eval_every, step + 1, last=settings.max_steps):
                metrics |= self.run_validation(step + 1)
            self.log.write(step, metrics | self._timer_metrics(rollouts.metrics))
            if _is_due(settings.save_every, step + 1, last=settings.max_steps):
                self.save()

    def generate_rollouts(self, step: int) -> Rollouts:
        """Samples and scores one batch of prompts; scoring overlaps with the log-prob pass."""
        rollout = self.config.rollout
        order = PromptOrder(len(self.train_prompts), self.config.trainer.seed)
        prompts = [
            self.train_prompts[i] for i in order.batch(self.state.consumed_samples, rollout.prompts_per_step)
        ]
        self.prepare_for_inference()
        with self.timers("generate"):
            groups = self._sample(prompts, rollout.group_size, purpose="rollout", step=step)
        self.finish_inference()
        scoring = self.verifier.start_step(_own_share(groups))
        with self.timers("logprobs"):
            updates = pack(
                groups,
                layout=self.pack_layout,
                prompts_per_update=self.config.algorithm.prompts_per_update,
                seed=derive_seed(self.config.trainer.seed, "updates", step),
            )
            updates, sums = compute_logprobs(self.policy, updates)
        with self.timers("verify"):
            rewards, verifier_metrics = self._collect_rewards(scoring, groups)
        on_policy = sums.means()
        self._check_rollouts(on_policy, step)
        advantages = group_advantages(torch.tensor(rewards))
        metrics = _rollout_metrics(groups, rewards) | verifier_metrics | on_policy
        return Rollouts(
            updates=with_advantages(updates, advantages),
            entropy=on_policy["entropy"],
            metrics={f"train_rollouts/{name}": value for name, value in metrics.items()},
        )

    def run_training(self, rollouts: Rollouts, weights: BlendWeights, step: int) -> dict[str, float]:
        """All optimizer updates of one step. Later epochs visit the same mini-batches in another order."""
        self.prepare_for_training()
        token_loss = policy_token_loss(self.config.algorithm, weights)
        sums: list[MetricSums] = []
        grad_norms: list[float] = []
        with self.timers("train"):
            self.policy.scheduler.step(increment=1)
            for epoch in range(self.config.algorithm.epochs):
                for index in _update_order(len(rollouts.updates), self.config.trainer.seed, step, epoch):
                    try:
                        update_sums, grad_norm = train_update(
                            self.policy, rollouts.updates[index], token_loss
                        )
                    except RuntimeError as error:
                        raise RuntimeError(f"step {step}, epoch {epoch}, update {index}: {error}") from error
                    self._check_first_update(update_sums)
                    sums += update_sums
                    grad_norms.append(grad_norm)
        self.finish_training()
        metrics = reduce_metrics(sums, self.policy.layout).means() | {
            "grad_norm": sum(grad_norms) / len(grad_norms),
            "lr": float(self.policy.optimizer.param_groups[0]["lr"]),
            "weight_upper": weights.upper,
            "weight_lower": weights.lower,
        }
        return {f"train_optim/{name}": value for name, value in metrics.items()}

    def run_validation(self, step: int) -> dict[str, float]:
        """mean@k and pass@k of the validation prompts, with the weights after `step` steps."""
        if not self.validation_prompts:
            return {}
        self.prepare_for_inference()
        with self.timers("validate"):
            groups = self._sample(
                self.validation_prompts, self.config.trainer.eval_samples, purpose="validation", step=step
            )
            rewards, _ = self._collect_rewards(self.verifier.start_step(_own_share(groups)), groups)
        self.finish_inference()
        return {f"val_rollouts/{name}": value for name, value in evaluation_metrics(rewards).items()}

    def save(self) -> Path:
        """A checkpoint of everything that the next step depends on."""
        self.prepare_for_training()
        settings = self.config.trainer
        name = self.config.algorithm.schedule.name
        state = replace(self.state, schedule={"name": name, **self.schedule.state_dict()})
        saved = save_checkpoint(
            self.policy, Path(settings.run_dir) / "checkpoints", state, keep=settings.keep_checkpoints
        )
        self.log.note(f"saved {saved}")
        self.finish_training()
        return saved

    def load_state_dict(self, checkpoint: Path, state: TrainerState) -> None:
        """Goes back to a checkpoint; the engine gets the weights before it samples."""
        saved = dict(state.schedule)
        name = saved.pop("name")
        if name != self.config.algorithm.schedule.name:
            raise ConfigError(
                f"algorithm.schedule.name={self.config.algorithm.schedule.name}, but {checkpoint} was saved under {name}. "
                "Set it to that, or use another trainer.run_dir."
            )
        load_checkpoint(self.policy, checkpoint)
        self.schedule.load_state_dict(saved)
        self.state = state
        self.engine_version = None

    def prepare_for_inference(self) -> None:
        """Brings the current weights into the engine."""
        release_cached_memory()
        if self.engine_version != self.state.weight_version:
            with self.timers("refit"):
                self.engine.refit(hf_weights(self.policy), version=self.state.weight_version)
            self.engine_version = self.state.weight_version

    def finish_inference(self) -> None:
        """Takes the engine's memory back."""
        self.engine.free()

    def prepare_for_training(self) -> None:
        self.policy.model.train()

    def finish_training(self) -> None:
        self.policy.optimizer.zero_grad()

    def _sample(
        self, prompts: Sequence[Prompt], group_size: int, *, purpose: str, step: int
    ) -> list[SampleGroup]:
        rollout = self.config.rollout
        sampling = Sampling(
            group_size=group_size,
            max_response_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            seed=derive_seed(self.config.trainer.seed, purpose, step),
        )
        groups = self.engine.generate(prompts, sampling)
        check_groups(groups, weight_version=self.state.weight_version, group_size=group_size)
        return groups

    def _collect_rewards(
        self, scoring, groups: Sequence[SampleGroup]
    ) -> tuple[list[list[float]], dict[str, float]]:
        """Rewards of all groups in order, and counts of failed verdicts, on every rank: each rank scored its share."""
        result = self.verifier.finish_step(scoring)
        shares: list = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (result.rewards, result.timeouts, result.crashes))
        rewards = [shares[i % len(shares)][0][i // len(shares)] for i in range(len(groups))]
        counts = {
            "verifier_timeouts": sum(s[1] for s in shares),
            "verifier_crashes": sum(s[2] for s in shares),
        }
        return rewards, {name: float(value) for name, value in counts.items()}

    def _check_rollouts(self, on_policy: dict[str, float], step: int) -> None:
        """Guards on numbers that are the same on every rank, so that all stop together."""
        entropy, mismatch = on_policy["entropy"], on_policy["mismatch"]
        if not (math.isfinite(entropy) and entropy > 0):
            raise RuntimeError(
                f"step {step}: the policy's entropy is {entropy}; it must be finite and positive."
            )
        limit = self.config.rollout.mismatch_limit
        if not mismatch <= limit:
            raise RuntimeError(
                f"step {step}: trainer and engine log-probs differ by {mismatch:.3g} on average, more than "
                f"rollout.mismatch_limit={limit}. The engine's weights or precision are not the policy's; "
                "raise the limit only if that is meant."
            )

    def _check_first_update(self, sums: Sequence[MetricSums]) -> None:
        if self.is_first_update:
            self.is_first_update = False
            distance = reduce_metrics(sums, self.policy.layout).means()["log_ratio_abs"]
            if not distance <= KERNEL_NOISE:
                raise RuntimeError(
                    f"the mean |log ratio| of the first update is {distance:.3g}, above {KERNEL_NOISE}: old log-probs "
                    "and training do not compute the same function."
                )

    def _advanced(self) -> TrainerState:
        return replace(
            self.state,
            step=self.state.step + 1,
            consumed_samples=self.state.consumed_samples + self.config.rollout.prompts_per_step,
            weight_version=self.state.weight_version + 1,
        )

    def _timer_metrics(self, rollout_metrics: dict[str, float]) -> dict[str, float]:
        """Seconds by name, the slowest rank's, and response tokens per second of the whole step."""
        seconds = self.timers.seconds()
        slowest = torch.tensor(list(seconds.values()), device=device(), dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        timers = dict(zip(seconds, slowest.tolist(), strict=True))
        samples = self.config.rollout.prompts_per_step * self.config.rollout.group_size
        tokens = rollout_metrics["train_rollouts/response_length"] * samples
        return {f"timers/{name}": value for name, value in timers.items()} | {
            TOKENS_PER_SECOND: tokens / timers["step"]
        }


def _own_share(groups: Sequence[SampleGroup]) -> list[SampleGroup]:
    """Every world-size-th group, for this rank's verifier."""
    return list(groups[dist.get_rank() :: dist.get_world_size()])


def _update_order(num_updates: int, seed: int, step: int, epoch: int) -> list[int]:
    """The first epoch takes the updates as packed, later ones shuffle them."""
    if epoch == 0:
        return list(range(num_updates))
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", step, epoch))
    return torch.randperm(num_updates, generator=generator).tolist()


def _rollout_metrics(groups: Sequence[SampleGroup], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.token_ids) for sample in samples]
    flat = [reward for group in rewards for reward in group]
    return {
        "reward": sum(flat) / len(flat),
        "group_pass_rate": sum(max(group) > 0 for group in rewards) / len(rewards),
        "group_signal_rate": sum(min(group) < max(group) for group in rewards) / len(rewards),
        "response_length": sum(lengths) / len(lengths),
        "truncated": sum(sample.is_truncated for sample in samples) / len(samples),
    }


def _is_due(every: int, step: int, *, last: int) -> bool:
    """True at the last step, and each `every` steps unless that is 0."""
    return step == last or (every > 0 and step % every == 0)
