"""Megatron's part of a checkpoint: its plan of who writes what, carried out by this process or by one forked from it.

megatron-core plans, and writes .metadata when all ranks have written their tensors. Between the two this module stands in
for its writer, which waits for ever when one of its processes dies, syncs a file before the last bytes are in it, and
keeps a helper process that outlives a killed rank. What is written is the same.

In the background: tensors on a GPU are copied to the host before schedule() returns; those on the host are the forked
process's own from the fork on, because the kernel copies a page before either of the two changes it.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import pickle
import queue
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_fec.policy.checkpoint_files import CheckpointError, reason, synced_digest

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
Bucket = tuple[str, str, tuple[list, list]]  # megatron-core's: path, name, (bytes, tensors) of one file


class Results:
    """What the writing process hands back, in memory that it shares with this one; megatron-core calls it a queue."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint_results"), "w+b")

    def put(self, results: Any) -> None:
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        if os.fstat(self._file.fileno()).st_size == 0:
            raise queue.Empty
        self._file.seek(0)
        return pickle.load(self._file)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorWrite:
    """This rank's share of a planned save."""

    request: AsyncRequest  # its async_fn leaves what it did in `results`
    finalize_fns: list[Callable[[], None]]  # megatron-core's, for all ranks to call when all have written
    results: Results
    num_bytes: int  # of this rank's tensors

    def digests(self) -> dict[str, str]:
        """The digest of each file that this rank has written. CheckpointError when it has not."""
        if self.request.async_fn is None:
            return {}
        try:
            _, digests, fault = self.results.get_nowait()
        except queue.Empty as error:
            raise CheckpointError(
                "the process that writes the checkpoint ended before it had done so"
            ) from error
        if fault is not None:
            raise CheckpointError(fault)
        return digests

    def run(self) -> None:
        """Writes now, in this process."""
        request = self.request
        if request.async_fn is not None:
            rank, buckets, results = request.async_fn_args
            request.async_fn(rank, request.preload_fn() if request.preload_fn else buckets, results)


def plan_write(state: dict[str, Any], folder: Path) -> TensorWrite:
    """Agrees with the other ranks on who writes which tensors to which file of `folder`; a collective call."""
    results = Results()
    filesystem_async._results_queue = _MegatronsView(results)  # type: ignore[assignment]
    own_format: dict[str, Any] = {"async_strategy": "mcore"} if _has_strategies() else {}
    request = dist_checkpointing.save(
        state, str(folder), validate_access_integrity=False, async_sharded_save=True, **own_format
    )
    assert request is not None
    buckets: list[Bucket] = request.async_fn_args[1] if request.async_fn is not None else []
    write: Callable | None = None
    if request.async_fn is not None:
        transforms = request.async_fn.args[0]
        request = request._replace(async_fn_args=[request.async_fn_args[0], buckets, results])
        write = partial(_write, transforms, os.getpid())
    return TensorWrite(
        request=request._replace(async_fn=write, finalize_fns=[]),
        finalize_fns=list(request.finalize_fns),
        results=results,
        num_bytes=sum(tensor.nbytes for _, _, (_, tensors) in buckets for _, tensor in tensors),
    )


class _MegatronsView:
    """Results as megatron-core's finalize step expects them: without our digests."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def get_nowait(self) -> Any:
        return self._results.get_nowait()[0]


def _has_strategies() -> bool:
    """megatron-core 0.19 saves through another package unless told otherwise."""
    return "async_strategy" in inspect.signature(dist_checkpointing.save).parameters


def _write(transforms: list, owner: int, rank: int, buckets: list[Bucket], results: Results) -> None:
    """Writes the files of this rank, each in a thread of its own. owner: the process whose tensors these are."""
    if os.getpid() != owner:
        _be_a_writer(owner)
    try:
        with ThreadPoolExecutor(len(buckets)) as pool:
            written = list(pool.map(partial(_write_file, transforms), range(len(buckets)), buckets))
    except Exception as error:  # of any kind: this process is not the one that can tell the user
        results.put((None, None, reason(error)))
        return
    digests = {name: digest for (_, name, _), (_, digest) in zip(buckets, written, strict=True)}
    results.put(({number: items for number, (items, _) in enumerate(written)}, digests, None))


def _write_file(transforms: list, number: int, bucket: Bucket) -> tuple[list, str]:
    """megatron-core's list of what lies where in the file, and the file's digest."""
    path = Path(bucket[0])
    returned: queue.SimpleQueue = queue.SimpleQueue()
    counted: queue.Queue = queue.Queue()
    counted.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms,
        number,
        bucket,  # type: ignore[arg-type]
        returned,  # type: ignore[arg-type]
        counted,  # type: ignore[arg-type]
        use_fsync=False,  # it would sync before Python's buffer is flushed
    )
    _, items = returned.get()
    try:
        if isinstance(items, Exception):
            raise items
        return items, synced_digest(path)
    except Exception as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error


def _be_a_writer(owner: int) -> None:
    """Lets this forked process outlive a signal that asks the rank to stop, and not the rank itself."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it died before the line above
        os._exit(1)
    torch.set_num_threads(1)  # a pool of OpenMP threads does not survive the fork
