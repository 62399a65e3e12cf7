"""Which training tokens of a run are dumped, and where: those of trainer.dump_every, and those that were not finite."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_fec.algorithm.thresholds import threshold_lines
from megatron_fec.config import Config
from megatron_fec.policy.parallel import ParallelLayout
from megatron_fec.rollout_dump import DumpSettings, RolloutDump, step_folder
from megatron_fec.types import LOG_RATIO_CLAMP, BlendWeights, MicroBatch, TokenStats


@dataclass(slots=True, kw_only=True)
class UpdateRecord:
    """This rank's tokens of one update as the loss saw them, kept until it is known whether all was finite."""

    update: int  # number inside the step, over all epochs
    epoch: int
    seed: int
    parts: list[tuple[MicroBatch, TokenStats]] = field(default_factory=list)

    def see(self, *, micro_batch: MicroBatch, stats: TokenStats) -> None:
        """An observer of token_loss.py; keeps no graph."""
        tensors = {f.name: getattr(stats, f.name) for f in fields(stats)}
        detached = {name: value.detach() for name, value in tensors.items() if isinstance(value, Tensor)}
        self.parts.append((micro_batch, replace(stats, **detached)))

    def write(self, dump: RolloutDump) -> None:
        for micro_batch, stats in self.parts:
            dump.add(
                update=self.update, epoch=self.epoch, seed=self.seed, micro_batch=micro_batch, stats=stats
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDumps:
    """Of one run on one rank."""

    config: Config
    layout: ParallelLayout

    def of_step(
        self, step: int, weights: BlendWeights
    ) -> AbstractContextManager[RolloutDump | None, bool | None]:
        """Where the tokens of this step go, on the ranks that hold them once; None when it is not due."""
        every = self.config.trainer.dump_every
        if not (every and step % every == 0 and self.layout.reports_metrics):
            return nullcontext()
        return self._dump(self._dumps, step, weights)

    def write(self, name: str, step: int, weights: BlendWeights, *records: UpdateRecord) -> Path:
        """The folder RUN/dumps/NAME/step_NNNNNN, whole when this returns; every rank calls it."""
        dumps = self._dumps / name
        if self.layout.reports_metrics:
            with self._dump(dumps, step, weights) as dump:
                for record in records:
                    record.write(dump)
        dist.barrier()  # a rank that ends sooner would take the writing ones with it
        return step_folder(dumps, step)

    @property
    def _dumps(self) -> Path:
        return Path(self.config.trainer.run_dir) / "dumps"

    def _dump(self, dumps: Path, step: int, weights: BlendWeights) -> RolloutDump:
        algorithm = self.config.algorithm
        settings = DumpSettings(
            step=step,
            parts=dist.get_world_size(self.layout.data_group),
            group_size=self.config.rollout.group_size,
            policy_loss=algorithm.policy_loss,
            options=algorithm.options,
            schedule=algorithm.schedule.name,
            weights=weights,
            lines=threshold_lines(algorithm.thresholds),
            aggregation=algorithm.aggregation,
            log_ratio_clamp=LOG_RATIO_CLAMP,
            max_response_tokens=self.config.rollout.max_response_tokens,
        )
        return RolloutDump(dumps, part=dist.get_rank(self.layout.data_group), settings=settings)
