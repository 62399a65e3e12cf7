"""The optimizer updates of a step, and what becomes of one whose log-probs, loss or gradients are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_fec.algorithm.entropy_change import derived
from megatron_fec.algorithm.strategies import marks_of
from megatron_fec.algorithm.thresholds import threshold_lines
from megatron_fec.config import Config
from megatron_fec.errors import RunError
from megatron_fec.marks import mark_update
from megatron_fec.metrics import MetricSums
from megatron_fec.policy.nonfinite import NonFiniteError
from megatron_fec.policy.precision_check import METRICS, PrecisionCheck, start_check
from megatron_fec.policy.step import Policy, TokenLoss, reduce_metrics, token_statistics, train_update
from megatron_fec.policy_options import options_of_policy
from megatron_fec.seeds import derive_seed
from megatron_fec.step_dump import StepDumps, UpdateRecord
from megatron_fec.token_loss import policy_token_loss
from megatron_fec.types import BlendWeights, MicroBatch

KERNEL_NOISE = (
    1e-3  # largest mean |log ratio| before the first update: the same weights through the same kernel
)
MAX_SKIPS_IN_A_ROW = 3  # a bad batch is one update; under bad weights every one is


@dataclass(slots=True, kw_only=True)
class Updates:
    """Makes them, on every rank; the counts are part of a checkpoint."""

    config: Config
    policy: Policy
    dumps: StepDumps
    note: Callable[[str], None]
    is_first: bool = True  # the next update is the first of this process
    skipped: int = 0  # in the whole run
    skips_in_a_row: int = 0  # up to now

    def run(
        self, updates: Sequence[Sequence[MicroBatch]], weights: BlendWeights, step: int
    ) -> dict[str, float]:
        """The metrics of one step. Later epochs visit the same mini-batches in another order."""
        sums: list[MetricSums] = []
        grad_norms: list[float] = []
        seed = self.config.trainer.seed
        orders = [
            (epoch, index)
            for epoch in range(self.config.algorithm.epochs)
            for index in update_order(len(updates), seed, step, epoch)
        ]
        check = self._precision_check(updates, step)
        with self.dumps.of_step(step, weights) as dump:
            self.policy.scheduler.step(increment=1)
            for number, (epoch, index) in enumerate(orders):
                record = UpdateRecord(
                    update=number, epoch=epoch, seed=derive_seed(seed, "loss", step, epoch, index)
                )
                try:
                    update_sums, grad_norm = self._update(updates[index], weights, record)
                except NonFiniteError as error:
                    self._skip_or_raise(error, weights, step, record)
                    continue
                self._check_first(update_sums)
                self.skips_in_a_row = 0
                sums += update_sums
                grad_norms.append(grad_norm)
                if dump is not None:
                    record.write(dump)
        return self._metrics(sums, grad_norms) | self._checked(check, weights, step)

    def refuse(self, error: NonFiniteError, updates: Sequence[Sequence[MicroBatch]], step: int) -> RunError:
        """What to raise before any update of a step; all its tokens are dumped, with advantages of 0."""
        records = []
        for number, update in enumerate(updates):
            record = UpdateRecord(update=number, epoch=0, seed=0)
            for micro_batch, stats in token_statistics(self.policy, update, second_moments=True):
                if stats is not None:
                    record.see(micro_batch=replace(micro_batch, old_logprobs=stats.logprobs), stats=stats)
            records.append(record)
        unknown = BlendWeights(upper=0.0, lower=0.0)  # the schedule is asked later
        folder = self.dumps.write("nonfinite_logprobs", step, unknown, *records)
        return RunError(f"step {step}, before its first update: {error}. Its tokens are in {folder}.")

    def _update(
        self, micro_batches: Sequence[MicroBatch], weights: BlendWeights, record: UpdateRecord
    ) -> tuple[list[MetricSums], float]:
        """One optimizer step: this rank's metric sums, and the gradient norm."""
        marked = self._marked(micro_batches, weights, record.seed)
        return train_update(self.policy, marked, self._token_loss(weights, record))

    def _skip_or_raise(
        self, error: NonFiniteError, weights: BlendWeights, step: int, record: UpdateRecord
    ) -> None:
        """What trainer.on_nonfinite says of an update that was not made, after its tokens are dumped."""
        folder = self.dumps.write(f"nonfinite_update_{record.update:04d}", step, weights, record)
        fault = (
            f"step {step}, epoch {record.epoch}, update {record.update}: {error}. Its tokens are in {folder}"
        )
        if self.config.trainer.on_nonfinite == "stop":
            raise RunError(f"{fault}; trainer.on_nonfinite=skip goes on without such updates.") from error
        self.skipped += 1
        self.skips_in_a_row += 1
        if self.skips_in_a_row > MAX_SKIPS_IN_A_ROW:
            raise RunError(
                f"{fault}. The {MAX_SKIPS_IN_A_ROW} updates before it were skipped too, so it is not the batch: go "
                "back to an older checkpoint, or lower optimizer.lr."
            ) from error
        self.note(f"skipped {fault}.")

    def _metrics(self, sums: Sequence[MetricSums], grad_norms: Sequence[float]) -> dict[str, float]:
        metrics = {"lr": float(self.policy.optimizer.param_groups[0]["lr"])}
        if grad_norms:  # else every update was skipped
            means = reduce_metrics(sums, self.policy.layout).means()
            metrics |= means | derived(means) | {"grad_norm": sum(grad_norms) / len(grad_norms)}
        if self.config.trainer.on_nonfinite == "skip":
            metrics["skipped_updates"] = float(self.skipped)
        return metrics

    def _marked(self, update: Sequence[MicroBatch], weights: BlendWeights, seed: int) -> Sequence[MicroBatch]:
        """With what the loss wants computed over the whole update first, if anything."""
        algorithm = self.config.algorithm
        marks = marks_of(algorithm.policy_loss, algorithm.options)
        if marks is None:
            return update
        lines = threshold_lines(algorithm.thresholds)
        return mark_update(self.policy, update, marks, weights=weights, lines=lines, seed=seed)

    def _token_loss(self, weights: BlendWeights, record: UpdateRecord) -> TokenLoss:
        layout = self.policy.layout
        return policy_token_loss(
            self.config.algorithm,
            weights,
            max_response_tokens=self.config.rollout.max_response_tokens,
            context_group=layout.context_group if layout.context_parallel > 1 else None,
            seed=record.seed,
            observe=record.see,
        )

    def _precision_check(self, updates: Sequence[Sequence[MicroBatch]], step: int) -> PrecisionCheck | None:
        """The comparison of FP8 with bf16, when it is due."""
        every = options_of_policy(self.config.policy).fp8_check_every
        if not every or step % every:
            return None
        return start_check(
            self.policy, updates, draw=derive_seed(self.config.trainer.seed, "fp8_check", step)
        )

    def _checked(self, check: PrecisionCheck | None, weights: BlendWeights, step: int) -> dict[str, float]:
        if check is None:
            return {}
        metrics = check.finish(weights, lines=threshold_lines(self.config.algorithm.thresholds))
        flipped = metrics[f"{METRICS}flipped"]
        limit = options_of_policy(self.config.policy).fp8_flip_limit
        if not flipped <= limit:
            raise RunError(
                f"step {step}: {self.config.policy.precision} clips {flipped:.3g} of the sampled response tokens "
                f"otherwise than bf16 does, more than policy.options.fp8_flip_limit={limit}. Keep layers in bf16 "
                "(policy.options.fp8_bf16_layers_at_start, _at_end), use policy.precision=bf16, or raise the limit."
            )
        return metrics

    def _check_first(self, sums: Sequence[MetricSums]) -> None:
        if self.is_first:
            self.is_first = False
            distance = reduce_metrics(sums, self.policy.layout).means()["log_ratio_abs"]
            # The scales of delayed scaling move with every micro-batch that trains.
            moves = self.config.policy.precision == "fp8_delayed"
            limit = self.config.rollout.mismatch_limit if moves else KERNEL_NOISE
            if not distance <= limit:
                raise RunError(
                    f"the mean |log ratio| of the first update is {distance:.3g}, above {limit}: old log-probs "
                    "and training do not compute the same function."
                )


def update_order(num_updates: int, seed: int, step: int, epoch: int) -> list[int]:
    """The first epoch takes the updates as packed, later ones shuffle them."""
    if epoch == 0:
        return list(range(num_updates))
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", step, epoch))
    return torch.randperm(num_updates, generator=generator).tolist()
