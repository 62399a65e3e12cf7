"""All rollout servers of a job, as rank 0 of the trainer sees them: found, fed with weights, asked, replaced.

A server that fails is named, asked to end, and its open prompts go to others. Whoever started it starts it again; it
comes back with another file in RUN/engines and gets the current weights. No prompt is asked for without end.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from megatron_fec.rollout.engine import Sampling, request_seeds
from megatron_fec.rollout.engine_client import (
    Deadlines,
    EngineClient,
    EngineError,
    Job,
    MakeSender,
    in_background,
)
from megatron_fec.rollout.engine_folder import read_addresses, read_key
from megatron_fec.rollout.weight_transfer import Bucket
from megatron_fec.types import Prompt, SampleGroup

MOST_SENDS = 3  # of one prompt: what fails on three engines is the prompt's fault, or the weights'
MOST_FAILURES = 3  # of one engine in a row; it is started again after each but the last
LOOK_SECONDS = 0.5  # between two looks into the folder, for a server that is awaited

Result = TypeVar("Result")


class Fleet:
    """Not for several threads at a time. `say` gets a line on whatever a person should know."""

    def __init__(
        self, folder: Path, *, make_sender: MakeSender, say: Callable[[str], None], deadlines: Deadlines
    ) -> None:
        self._folder, self._key = folder, read_key(folder)
        self._make_sender, self._say, self._deadlines = make_sender, say, deadlines
        self._clients: dict[str, EngineClient] = {}
        self._lost: dict[str, tuple[float, EngineError]] = {}  # name -> since when, why
        self._failures: Counter[str] = Counter()  # by name, since its last success
        self._buckets: list[Bucket] = []
        self._version: int | None = None
        self.counts = {"engine_restarts": 0, "resent_prompts": 0}

    def load(self, buckets: list[Bucket], version: int) -> None:
        """Brings the weights into every engine that answers, at least one. They are kept for those that come back."""
        self._buckets, self._version = buckets, version
        for client in self._clients.values():
            client.version = None
        self._ready()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[SampleGroup]:
        """One group for each prompt. Engine i of n gets prompts i, i + n, ...; what fails goes round again."""
        if self._version is None:
            raise RuntimeError("generate before refit: the engines start without weights. Call refit first.")
        job = Job(
            version=self._version,
            sampling=sampling,
            prompts=prompts,
            seeds=request_seeds(prompts, sampling.seed),
        )
        groups: dict[int, SampleGroup] = {}
        faults: defaultdict[int, list[EngineError]] = defaultdict(list)  # that a prompt has met
        while missing := [place for place in range(len(prompts)) if place not in groups]:
            clients = self._ready()
            shares = [missing[i :: len(clients)] for i in range(len(clients))]
            work = [
                lambda client=client, share=share: client.generate(job, share)
                for client, share in zip(clients, shares, strict=True)
                if share
            ]
            for client, share, (found, fault) in zip(clients, shares, _at_once(work), strict=False):
                groups |= found
                if fault is None:
                    self._failures[client.address.name] = 0
                else:
                    left = [place for place in share if place not in found]
                    self._lose(client, fault)
                    self._resend(left, fault, faults)
        return [groups[place] for place in range(len(prompts))]

    def take_counts(self) -> dict[str, float]:
        """What has happened since the last call."""
        taken = {name: float(value) for name, value in self.counts.items()}
        self.counts = dict.fromkeys(self.counts, 0)
        return taken

    def _ready(self) -> list[EngineClient]:
        """The engines with the current weights, by name. Waits for one; raises when one is gone for too long."""
        while True:
            self._look()
            stale = [client for client in self._clients.values() if client.version != self._version]
            _at_once([lambda client=client: self._bring_up(client) for client in stale])
            now = time.monotonic()
            for since, fault in self._lost.values():
                if now - since > self._deadlines.restart:
                    raise RuntimeError(
                        f"{fault}. It was not started again within {self._deadlines.restart:g} s; see its log, "
                        "and start the job again."
                    ) from fault
            if self._clients:
                return [self._clients[name] for name in sorted(self._clients)]
            if not self._lost:
                raise RuntimeError(
                    f"rollout.engine=servers: {self._folder} names no engine of this job's key. Start one with "
                    "launch/serve.py, or slurm/rollout_and_train.sh, which starts them with the trainer."
                )
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        """Servers that are new, or new again."""
        for address in read_addresses(self._folder, self._key):
            known = self._clients.get(address.name)
            if known is not None and known.address.instance == address.instance:
                continue
            since = self._lost.get(address.name)
            if since is not None and since[1].address.instance == address.instance:
                continue  # the file of the process that failed
            if known is not None or since is not None:
                self._lost.pop(address.name, None)
                self.counts["engine_restarts"] += 1
                self._say(f"engine {address.name} on {address.node} was started again")
            self._clients[address.name] = EngineClient(address, self._key, self._deadlines, self._make_sender)

    def _bring_up(self, client: EngineClient) -> None:
        assert self._version is not None
        try:
            for text in client.load(self._buckets, self._version):
                self._say(text)
        except EngineError as fault:
            self._lose(client, fault)

    def _lose(self, client: EngineClient, fault: EngineError) -> None:
        name = client.address.name
        client.leave()
        del self._clients[name]
        self._failures[name] += 1
        if self._failures[name] >= MOST_FAILURES:
            raise RuntimeError(f"{fault}. It has failed {MOST_FAILURES} times in a row.") from fault
        self._lost[name] = (time.monotonic(), fault)
        self._say(f"{fault}; it has {self._deadlines.restart:g} s to be started again")

    def _resend(
        self, places: Sequence[int], fault: EngineError, faults: defaultdict[int, list[EngineError]]
    ) -> None:
        for place in places:
            faults[place].append(fault)
            if len(faults[place]) == MOST_SENDS:
                told = "; ".join(str(one) for one in faults[place])
                raise RuntimeError(f"prompt number {place} was sent {MOST_SENDS} times in vain: {told}")
        self.counts["resent_prompts"] += len(places)
        self._say(f"{len(places)} prompts of {fault.address.name} are sent again")


def _at_once(work: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each returns, each in a thread of its own."""
    return [future.result() for future in [in_background(one) for one in work]]
