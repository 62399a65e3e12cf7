"""The trainer's side of one rollout server: requests with deadlines, and every way it can fail under one name."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from megatron_fec.rollout.engine import Sampling, group_fault
from megatron_fec.rollout.engine_folder import EngineAddress
from megatron_fec.rollout.weight_transfer import Bucket, Sender, combined
from megatron_fec.rollout.wire import Request, WireError, samples_from_bytes, send
from megatron_fec.types import Prompt, SampleGroup

BUCKET_SENDS = 3  # of one bucket before the engine is given up
QUIT_SECONDS = 5.0

Result = TypeVar("Result")
# (address of this end, ranks of the group, seconds for a bucket) -> a sender
MakeSender = Callable[[str, int, float], Sender]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds; not settings, because a run that needs others has another fault."""

    answer: float = 30.0  # of any request: handlers answer beside the engine, whatever it does
    poll: float = 2.0  # how long a server may hold back a poll when nothing is finished
    stall: float = 120.0  # for a decoding step; the slowest, a prefill of the largest batch, takes seconds
    transfer: float = 120.0  # to meet for a transfer, and for one bucket
    restart: float = 900.0  # until a lost engine is back; vLLM loads and compiles for minutes on a GPU


class EngineError(RuntimeError):
    """An engine failed; the message names it."""

    def __init__(self, address: EngineAddress, text: str) -> None:
        super().__init__(f"engine {address.name} on {address.node}: {text}")
        self.address = address


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One call of generate."""

    version: int
    sampling: Sampling
    prompts: Sequence[Prompt]
    seeds: Sequence[int]


class EngineClient:
    """One start of one server."""

    def __init__(
        self, address: EngineAddress, key: bytes, deadlines: Deadlines, make_sender: MakeSender
    ) -> None:
        self.address = address
        self.version: int | None = None  # of the weights in the engine
        self._key, self._deadlines, self._make_sender = key, deadlines, make_sender
        self._session, self._count = secrets.token_hex(8), 0
        self._sender: Sender | None = None

    def fault(self, text: str) -> EngineError:
        return EngineError(self.address, text)

    def generate(self, job: Job, places: Sequence[int]) -> tuple[dict[int, SampleGroup], EngineError | None]:
        """The groups of the prompts at these places, and what stopped the rest."""
        groups: dict[int, SampleGroup] = {}
        try:
            self._generate(job, set(places), groups)
        except EngineError as fault:
            return groups, fault
        return groups, None

    def load(self, buckets: Sequence[Bucket], version: int) -> list[str]:
        """Brings weights into the engine. Returns what went wrong on the way and was put right."""
        self.version = None
        mended: list[str] = []
        if self._sender is None:
            self._sender = self._connected()
        self.ask("/start")
        for bucket in buckets:
            for _ in range(BUCKET_SENDS):
                self.ask("/bucket", bucket.description())
                fault = self._transferred(lambda bucket=bucket: self._sender.send(bucket.data))  # type: ignore[union-attr]
                if not fault:
                    break
                mended.append(str(self.fault(f"{fault}; it was sent again")))
            else:
                raise self.fault(f"{fault}, {BUCKET_SENDS} times")
        expected = combined(bucket.checksum for bucket in buckets)
        answer = self.ask("/finish", {"version": version}, timeout=self._deadlines.transfer)
        if set(answer["checksums"]) != {expected}:
            raise self.fault(
                f"its weights of version {version} have checksums {answer['checksums']}, not {expected}"
            )
        self.version = version
        return mended

    def ask(self, path: str, payload: dict[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """The JSON answer."""
        return json.loads(self._ask(path, payload or {}, timeout or self._deadlines.answer))

    def leave(self) -> None:
        """Gives the engine up: its process is asked to end, so that it is started again. Returns at once."""
        self.version = None
        sender, self._sender = self._sender, None

        def end() -> None:
            with suppress(EngineError):  # dead already, or it will read this when it wakes up
                self._ask("/quit", {}, QUIT_SECONDS)
            if sender is not None:
                sender.close()

        in_background(end)

    def _generate(self, job: Job, missing: set[int], groups: dict[int, SampleGroup]) -> None:
        name = secrets.token_hex(8)
        prompts = [
            {"place": i, "token_ids": job.prompts[i].token_ids, "seed": job.seeds[i]} for i in sorted(missing)
        ]
        self.ask(
            "/generate",
            {"job": name, "version": job.version, "sampling": asdict(job.sampling), "prompts": prompts},
            timeout=self._deadlines.stall,
        )
        steps, moved, deadline = -1, time.monotonic(), self._deadlines.stall
        while missing:
            poll = {"job": name, "after": len(groups), "wait": self._deadlines.poll}
            body = self._ask("/results", poll, self._deadlines.answer + self._deadlines.poll)
            try:
                packed, more = samples_from_bytes(body)
            except WireError as error:
                raise self.fault(f"{error}") from error
            new = packed.samples()
            for place, samples in new:
                if place not in missing:
                    raise self.fault(
                        f"it returned prompt number {place}, which it was not to answer, or twice"
                    )
                group = SampleGroup(prompt=job.prompts[place], samples=samples)
                wrong = group_fault(group, weight_version=job.version, group_size=job.sampling.group_size)
                if wrong:
                    raise self.fault(wrong)
                groups[place] = group
                missing.discard(place)
            if more["steps"] != steps:
                steps, moved = more["steps"], time.monotonic()
            elif time.monotonic() - moved > deadline:
                raise self.fault(
                    f"it made no decoding step for {deadline:g} s, with {len(missing)} prompts left"
                )
            if missing and not new and not more["busy"]:
                raise self.fault(f"it is idle, with {len(missing)} prompts left")

    def _connected(self) -> Sender:
        """A connection for weights, from the address by which this machine reaches the engine."""
        try:
            with socket.create_connection(
                (self.address.host, self.address.port), self._deadlines.answer
            ) as probe:
                own = probe.getsockname()[0]
        except OSError as error:
            raise self.fault(_text(error)) from error
        size = 1 + self.ask("/health")["tensor_parallel"]
        sender = self._make_sender(own, size, self._deadlines.transfer)
        self.ask(
            "/connect",
            {**sender.meeting, "world_size": size, "timeout": self._deadlines.transfer},
        )
        fault = self._transferred(sender.connect)
        if fault:
            raise self.fault(fault)
        return sender

    def _transferred(self, work: Callable[[], None]) -> str:
        """Does this end's half of what the engine was told to expect; then the engine's own word on it."""
        try:
            in_background(work).result(2 * self._deadlines.transfer)
        except TimeoutError as error:
            raise self.fault("the transfer of weights hangs") from error
        except (RuntimeError, OSError) as error:
            raise self.fault(f"the transfer of weights broke off ({str(error).splitlines()[0]})") from error
        return self.ask("/loaded", timeout=self._deadlines.transfer)["fault"]

    def _ask(self, path: str, payload: dict[str, Any], timeout: float) -> bytes:
        self._count += 1
        request = Request(
            path=path,
            instance=self.address.instance,
            session=self._session,
            count=self._count,
            body=json.dumps(payload).encode(),
        )
        try:
            status, body = send(self.address.host, self.address.port, request, key=self._key, timeout=timeout)
        except TimeoutError as error:
            raise self.fault(f"no answer to {path} within {timeout:g} s") from error
        except OSError as error:
            raise self.fault(f"no answer to {path} ({_text(error)})") from error
        except WireError as error:
            raise self.fault(str(error)) from error
        if status != 200:
            raise self.fault(json.loads(body)["fault"])
        return body


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """In a daemon thread, which a process that ends does not wait for."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _text(error: OSError) -> str:
    return error.strerror or str(error)
