"""Run a function on gloo ranks: processes forked from the test, so imports are done and start-up is cheap."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
import torch.distributed as dist

GRACE = (
    2.0  # seconds for the other ranks to report once one has failed, and for a rank that has reported to exit
)


class RankError(AssertionError):
    """A rank raised, died or missed the deadline; holds the tracebacks, the first failure first."""


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, deadline: float = 120.0
) -> list[Any]:
    """[function(rank, *args) for each rank], all at the same time, each rank in a process of its own.

    The default process group is gloo over all ranks. function and args are inherited through the fork, so
    closures and tensors will do; results must be picklable. Ranks that still run `deadline` seconds after the
    start, or GRACE seconds after another rank failed, are killed.
    """
    torch.set_num_threads(1)  # a pool of OpenMP threads does not survive the fork
    fork = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = fork.Pipe()
                pipes.append(ours)
                target = (rank, world_size, f"file://{folder}/store", deadline, theirs, pipes, function, args)
                processes.append(fork.Process(target=_rank_main, args=target, daemon=True))
                processes[-1].start()
                theirs.close()  # the child then holds the only one, and its death is an end of file here
            results = _collect(pipes, time.monotonic() + deadline)
            for process, pipe in zip(processes, pipes, strict=True):
                pipe.send_bytes(b"leave")
                process.join(GRACE)
            return results
        finally:
            for process, pipe in zip(processes, pipes, strict=True):
                pipe.close()
                process.kill()  # does nothing to a process that has ended
                process.join()


def _collect(pipes: list[Connection], end: float) -> list[Any]:
    """Results in rank order, or RankError with every failure that was reported before `end`."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = dict(enumerate(pipes))
    while pending and (ready := wait(list(pending.values()), max(0.0, end - time.monotonic()))):
        for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
            is_result, reply = _receive(pending.pop(rank))
            (results if is_result else failures)[rank] = reply
            if len(failures) == 1 and not is_result:
                end = min(end, time.monotonic() + GRACE)
    if failures or pending:
        late = [f"rank {rank} did not finish in time" for rank in pending]
        raise RankError("\n".join([f"rank {rank} failed:\n{text}" for rank, text in failures.items()] + late))
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection) -> tuple[bool, Any]:
    """(True, result) or (False, traceback text) of one rank."""
    try:
        return cast(tuple[bool, Any], pickle.loads(pipe.recv_bytes()))
    except EOFError:
        return False, "the process ended without a result"


def _rank_main(
    rank: int,
    world_size: int,
    store: str,
    deadline: float,
    pipe: Connection,
    parent_pipes: list[Connection],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    for inherited in parent_pipes:
        inherited.close()  # so that the parent's death is an end of file here
    try:
        timeout = timedelta(seconds=deadline)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
        # Plain pickle copies tensors; Connection.send would share memory that goes away with this process.
        reply = pickle.dumps((True, function(rank, *args)))
    except BaseException:  # pytest's skip and fail too: the parent must hear of all of them
        reply = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(reply)
    pipe.poll(deadline)  # a rank that left now would break the connections of those that still work
