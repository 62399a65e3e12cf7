"""The reinforcement loop, in NeMo-Aligner's shape and SPMD: every rank runs every line.

Memory moves in prepare_for_* and finish_* only: the engine sleeps while the policy trains, and policy/offload.py says
where the policy is while the engine samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fec.algorithm.schedules import Schedule
from megatron_fec.collection import Collector
from megatron_fec.config import Config, ConfigError
from megatron_fec.errors import RunError
from megatron_fec.evaluate import evaluation_metrics
from megatron_fec.memory_log import PeakMemory
from megatron_fec.planning.first_step import no_note
from megatron_fec.policy.checkpoint import TrainerState, load_checkpoint, load_rng_state, rng_state
from megatron_fec.policy.checkpoint_save import Saver
from megatron_fec.policy.device import device, release_cached_memory
from megatron_fec.policy.nonfinite import NonFiniteError
from megatron_fec.policy.offload import Offload, Phase
from megatron_fec.policy.reference import ReferencePolicy
from megatron_fec.policy.step import Policy, compute_logprobs
from megatron_fec.policy.weights import hf_weights
from megatron_fec.rollout.packing import PackLayout, pack, with_sample_values
from megatron_fec.run_log import TOKENS_PER_SECOND, RunLog, Timers
from megatron_fec.seeds import derive_seed
from megatron_fec.stop import Stop, StopRequested
from megatron_fec.strategy_state import StrategyState
from megatron_fec.tasks.prompts import PromptOrder
from megatron_fec.types import BlendWeights, MicroBatch, Prompt
from megatron_fec.updates import Updates


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """One step's training data; micro-batches are this rank's, all else is the same on every rank."""

    updates: list[list[MicroBatch]]  # old_logprobs and advantages filled
    entropy: float  # token mean of the policy that sampled, nats
    drawn: int  # prompts taken from the order
    metrics: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Trainer:
    config: Config
    policy: Policy
    offload: Offload  # of the policy
    collector: Collector  # engine and verifier
    schedule: Schedule
    strategy_state: StrategyState
    train_prompts: Sequence[Prompt]
    validation_prompts: Sequence[Prompt]
    updates: Updates
    log: RunLog
    pack_layout: PackLayout
    state: TrainerState
    stop: Stop
    reference: ReferencePolicy | None = None
    memory: PeakMemory = field(default_factory=PeakMemory)
    timers: Timers = field(init=False)
    saver: Saver = field(default_factory=Saver)
    engine_version: int | None = None  # of the weights in the engine
    saved_step: int = 0  # of the newest checkpoint
    beside_plan: Callable[[Mapping[str, float]], str | None] = no_note  # of a row: what to print after it

    def __post_init__(self) -> None:
        self.timers = Timers(self.memory.during)

    def fit(self) -> None:
        """Steps until trainer.max_steps: sample, score, log-probs, schedule, updates, log, save and evaluate when due.

        StopRequested where all ranks agree to stop before that; every finished step is saved then, and the one that
        was under way, of which no update has been made, leaves no trace.
        """
        try:
            if self.state.unwritten:
                self.finish_step(self.state.unwritten)
            while self.state.step < self.config.trainer.max_steps:
                step = self.state.step
                self.stop.check("step", "save")
                self.timers.reset()
                with self.timers("step"), _randomness_kept_by_a_stop():
                    rollouts = self.generate_rollouts(step)
                    weights = self.schedule.weights(step, rollouts.entropy)
                    optim_metrics = self.run_training(rollouts, weights, step)
                    self.state = self._advanced(rollouts.drawn)
                self.finish_step(rollouts.metrics | optim_metrics)
        except StopRequested as request:
            if self.state.step > self.saved_step:
                self.save()
            self.note_saved(wait=True)
            steps = f"{self.state.step} of {self.config.trainer.max_steps} steps"
            raise StopRequested(f"{request} after {steps}") from request
        except RunError:
            self.note_saved(wait=True)  # all ranks are here: a save in the background can still become whole
            raise
        self.note_saved(wait=True)

    def finish_step(self, metrics: dict[str, float]) -> None:
        """Validation when due, the row, and a checkpoint when due, of the step that has just been trained.

        A stop puts the validation off: it may take longer than the grace after SIGTERM.
        """
        settings, step = self.config.trainer, self.state.step
        if settings.eval_every and _is_due(settings.eval_every, step, last=settings.max_steps):
            try:
                self.stop.check("validate", "save")
            except StopRequested:
                self.state = replace(self.state, unwritten=self._timer_metrics(metrics) | metrics)
                raise
            metrics = metrics | self.run_validation(step)
        row = self._timer_metrics(metrics) | metrics
        self.log.write(step - 1, row)
        if note := self.beside_plan(row):
            self.log.note(note)
        self.state = replace(self.state, unwritten={})
        if _is_due(settings.save_every, step, last=settings.max_steps):
            self.save()
        self.note_saved(wait=False)
        self.stop.learn(self.timers.seconds())

    def generate_rollouts(self, step: int) -> Rollouts:
        """Samples and scores one batch of prompts; scoring overlaps with the log-prob pass."""
        algorithm, seed = self.config.algorithm, self.config.trainer.seed
        self.prepare_for_inference()
        with self.timers("generate"):
            collection = self.collector.collect(
                self._draw, version=self.state.weight_version, seed=derive_seed(seed, "rollout", step)
            )
        self._sample_ahead(step + 1, collection.drawn)
        self.finish_inference(keep_weights=False)  # the next samples are of the weights after this step
        self.stop.check("logprobs", "verify", "train", "save")
        groups = collection.groups
        with self.timers("logprobs"):
            updates = pack(
                groups,
                layout=self.pack_layout,
                prompts_per_update=algorithm.prompts_per_update,
                seed=derive_seed(seed, "updates", step),
            )
            try:
                updates, sums = compute_logprobs(self.policy, updates)
            except NonFiniteError as error:
                raise self.updates.refuse(error, updates, step) from error
            if self.reference is not None:
                updates = self.reference.fill(self.policy, updates)
        self.stop.check("verify", "train", "save")  # the last: from here on the step changes what is saved
        with self.timers("verify"):
            rewards, metrics = self.collector.rewards(collection)
        on_policy = sums.means()
        self._check_rollouts(on_policy, step, is_stale=metrics["lag"] > 0)
        values = self.strategy_state.sample_values(groups, rewards, on_policy["entropy"])
        metrics |= on_policy | self.strategy_state.metrics()
        return Rollouts(
            updates=with_sample_values(updates, **values),
            entropy=on_policy["entropy"],
            drawn=collection.drawn,
            metrics={f"train_rollouts/{name}": value for name, value in metrics.items()},
        )

    def run_training(self, rollouts: Rollouts, weights: BlendWeights, step: int) -> dict[str, float]:
        """All optimizer updates of one step."""
        self.prepare_for_training()
        with self.timers("train"):
            metrics = self.updates.run(rollouts.updates, weights, step)
        self.finish_training()
        metrics |= self.schedule.metrics() | {"weight_upper": weights.upper, "weight_lower": weights.lower}
        return {f"train_optim/{name}": value for name, value in metrics.items()}

    def run_validation(self, step: int) -> dict[str, float]:
        """mean@k and pass@k of the validation prompts, with the weights after `step` steps."""
        if not self.validation_prompts:
            return {}
        self.prepare_for_inference()
        with self.timers("validate"):
            groups = self.collector.sample(
                self.validation_prompts,
                group_size=self.config.trainer.eval_samples,
                version=self.state.weight_version,
                seed=derive_seed(self.config.trainer.seed, "validation", step),
            )
            rewards = self.collector.score(groups)
        self.finish_inference(keep_weights=True)  # the next step samples with them too
        return {f"val_rollouts/{name}": value for name, value in evaluation_metrics(rewards).items()}

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on; note_saved tells when it is on disk."""
        self.prepare_for_saving()
        settings = self.config.trainer
        name = self.config.algorithm.schedule.name
        state = replace(
            self.state,
            schedule={"name": name, **self.schedule.state_dict()},
            strategies=self.strategy_state.state_dict(),
        )
        with self.memory.during("save"):
            self.saver.save(
                self.policy,
                Path(settings.run_dir) / "checkpoints",
                state,
                keep=settings.keep_checkpoints,
                in_background=settings.async_save,
            )
        self.saved_step = state.step

    def note_saved(self, *, wait: bool) -> None:
        """Tells of checkpoints that are on disk by now, and raises what went wrong with one in the background."""
        for saved in self.saver.finished(wait=wait):
            self.stop.learn({"save": self.saver.slowest})
            self.log.note(f"saved {saved}")

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
        self.strategy_state.load_state_dict(state.strategies)
        self.state = state
        self.updates.skipped, self.updates.skips_in_a_row = state.skipped_updates, state.skips_in_a_row
        self.saved_step = state.step
        self.engine_version = None

    def prepare_for_inference(self) -> None:
        """Brings the current weights into the engine, once it has finished what it samples ahead."""
        if self.config.rollout.max_lag:
            with self.timers("generate"):
                self.collector.finish_ahead()
        release_cached_memory()
        if self.engine_version != self.state.weight_version:
            self._move("refit")
            with self.timers("refit"):
                self.collector.engine.refit(hf_weights(self.policy), version=self.state.weight_version)
            self.engine_version = self.state.weight_version
        self._move("generate")

    def finish_inference(self, *, keep_weights: bool) -> None:
        """Takes the engine's memory back; without its weights, the next prepare_for_inference brings new ones."""
        self.collector.engine.free(keep_weights=keep_weights)
        if not keep_weights:
            self.engine_version = None
        self._move("logprobs")

    def prepare_for_training(self) -> None:
        self._move("train")
        self.policy.train()

    def finish_training(self) -> None:
        self.policy.optimizer.zero_grad()

    def prepare_for_saving(self) -> None:
        """The checkpoint reads weights and optimizer, which a validation may have sent away."""
        self._move("save")

    def _move(self, phase: Phase) -> None:
        with self.timers("offload"):
            self.offload.enter(phase)

    def _draw(self, batch: int, *, skipped: int = 0) -> list[Prompt]:
        """The prompts of a step's n-th batch; of the next step's where this one has drawn `skipped`."""
        count = self.config.rollout.prompts_per_step
        order = PromptOrder(len(self.train_prompts), self.config.trainer.seed)
        start = self.state.consumed_samples + skipped + batch * count
        return [self.train_prompts[i] for i in order.batch(start, count)]

    def _sample_ahead(self, step: int, drawn: int) -> None:
        """With rollout.max_lag=1, begins with step `step` by the weights that its predecessor trains from."""
        if self.config.rollout.max_lag and step < self.config.trainer.max_steps:
            self.collector.start_ahead(
                self._draw(0, skipped=drawn),
                version=self.state.weight_version,
                seed=derive_seed(self.config.trainer.seed, "rollout", step),
            )

    def _check_rollouts(self, on_policy: dict[str, float], step: int, *, is_stale: bool) -> None:
        """Guards on numbers that are the same on every rank, so that all stop together.

        is_stale: some samples are of older weights, so that their log-probs are meant to differ.
        """
        entropy, mismatch = on_policy["entropy"], on_policy["mismatch"]
        if not (math.isfinite(entropy) and entropy > 0):
            raise RunError(f"step {step}: the policy's entropy is {entropy}; it must be finite and positive.")
        limit = self.config.rollout.mismatch_limit
        if not (is_stale and math.isfinite(mismatch)) and not mismatch <= limit:
            raise RunError(
                f"step {step}: trainer and engine log-probs differ by {mismatch:.3g} on average, more than "
                f"rollout.mismatch_limit={limit}. The engine's weights or precision are not the policy's; "
                "raise the limit only if that is meant."
            )

    def _advanced(self, drawn: int) -> TrainerState:
        return replace(
            self.state,
            step=self.state.step + 1,
            consumed_samples=self.state.consumed_samples + drawn,
            weight_version=self.state.weight_version + 1,
            skipped_updates=self.updates.skipped,
            skips_in_a_row=self.updates.skips_in_a_row,
        )

    def _timer_metrics(self, rollout_metrics: dict[str, float]) -> dict[str, float]:
        """Seconds by name and peak memory, the largest of all ranks; tokens per second of the step if it was timed."""
        own = {f"timers/{name}": value for name, value in self.timers.seconds().items()} | self.memory.take()
        largest = torch.tensor(list(own.values()), device=device(), dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        metrics = dict(zip(own, largest.tolist(), strict=True))
        tokens = rollout_metrics["train_rollouts/response_tokens"]
        rate = {TOKENS_PER_SECOND: tokens / metrics["timers/step"]} if "timers/step" in metrics else {}
        return metrics | rate


@contextmanager
def _randomness_kept_by_a_stop() -> Iterator[None]:
    """The random states are those before the block, if a stop gives it up."""
    before = rng_state()
    try:
        yield
    except StopRequested:
        load_rng_state(before)
        raise


def _is_due(every: int, step: int, *, last: int) -> bool:
    """True at the last step, and each `every` steps unless that is 0."""
    return step == last or (every > 0 and step % every == 0)
