"""The engine that lives in other processes: rank 0 talks to rollout servers, all ranks get what they return.

It can also sample while the caller works: `start`, then `finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_fec.errors import RunError
from megatron_fec.rollout.engine import Sampling, engine_weights, gather_groups
from megatron_fec.rollout.engine_client import Deadlines, MakeSender, in_background
from megatron_fec.rollout.fleet import Fleet
from megatron_fec.rollout.weight_transfer import make_buckets
from megatron_fec.types import Prompt, SampleGroup

# Seconds. The ranks that wait for rank 0 meet this often, so that no collective comes near its own deadline.
HEARTBEAT = 10.0


class ServerEngine:
    """An `Engine` (rollout/engine.py). Every method is collective; an error of rank 0 is raised on all ranks."""

    def __init__(
        self,
        folder: Path,  # RUN/engines
        *,
        vocab_size: int,  # ids with a token
        is_tied: bool,
        make_sender: MakeSender,
        say: Callable[[str], None],
        deadlines: Deadlines | None = None,
    ) -> None:
        self._vocab_size, self._is_tied = vocab_size, is_tied
        self._fleet: Fleet | None = None  # on rank 0
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._fleet = Fleet(folder, make_sender=make_sender, say=say, deadlines=deadlines or Deadlines())
        self._running: tuple[Future[list[SampleGroup]] | None, Sequence[Prompt]] | None = None

    def refit(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Copies the stream to rank 0's host memory, and from there into every engine."""
        assert self._running is None, "the engines sample with the old weights; call finish first"
        if self._fleet is None:
            for _ in weights:  # collective
                pass
            return self._agree(None)
        fleet = self._fleet
        stream = engine_weights(weights, vocab_size=self._vocab_size, is_tied=self._is_tied)
        buckets = list(make_buckets(stream))
        return self._agree(in_background(lambda: fleet.load(buckets, version)))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[SampleGroup]:
        """One group for each prompt in the order of `prompts`, the complete list on every rank."""
        self.start(prompts, sampling)
        return self.finish()

    def start(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Begins to sample; no collective."""
        assert self._running is None, "call finish first"
        fleet = self._fleet
        future = in_background(lambda: fleet.generate(prompts, sampling)) if fleet is not None else None
        self._running = (future, prompts)

    def finish(self) -> list[SampleGroup]:
        """What `start` began."""
        assert self._running is not None, "call start first"
        (future, prompts), self._running = self._running, None
        self._agree(future)
        groups = future.result() if future is not None else []
        return gather_groups(groups, range(len(groups)), prompts=prompts, is_leader=future is not None)

    def free(self, *, keep_weights: bool) -> None:
        """Nothing to do: the engines have memory of their own, and sample ahead with these weights."""

    def asleep_bytes(self) -> int:
        return 0

    def counts(self) -> dict[str, float]:
        """Engines that were started again and prompts that were sent again, since the last call; on every rank."""
        box = [self._fleet.take_counts() if self._fleet is not None else {}]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _agree(self, future: Future | None) -> None:
        """Waits for rank 0's work; its error is raised on every rank."""
        while True:
            box: list[str | None] = [_outcome(future) if future is not None else None]
            if dist.is_initialized():
                dist.broadcast_object_list(box, src=0)
            if box[0] is not None:
                break
        if box[0]:
            raise RunError(box[0]) from (future.exception() if future is not None else None)


def _outcome(future: Future) -> str | None:
    """ "" when it is done, an error's text, None when it still runs after a heartbeat."""
    try:
        error = future.exception(HEARTBEAT)
    except TimeoutError:
        return None
    return "" if error is None else (str(error) or repr(error))
