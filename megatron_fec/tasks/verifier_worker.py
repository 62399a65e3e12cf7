"""A scoring process: what it may do, and its answers, one JSON line for each line that asks.

What it scores is untrusted: sympy may loop for ever or fill the memory, and several scorers of reasoning-gym evaluate
a response as Python. The kernel's limits and Python's audit events stop what is harmful by accident and what is
easily tried; they are no wall against a text that is made to break out of Python (docs/security.md).
Only the standard library is imported here, so that the process dies with its parent from its first moment.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

MEMORY_BYTES = 4 << 30  # that a worker may take beyond its imports
ERROR_CHARACTERS = 200  # of a scorer's error; some hold the whole response
OUT_OF_MEMORY = 9  # exit status
SET_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES = 1, 38  # of prctl(2)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (  # starts of audit events: other processes, the network, native code, what changes files
    *(
        "subprocess.",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.kill",
        "pty.",
        "signal.",
    ),
    *("socket.", "ctypes.", "mmap.", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.putenv", "os.remove"),
    *(
        "os.rename",
        "os.rmdir",
        "os.setxattr",
        "os.symlink",
        "os.truncate",
        "os.utime",
        "shutil.",
        "tempfile.",
    ),
)


def work(descriptor: int, scorers: str, timeout: float) -> None:
    """The life of a worker: a line when it is ready, then an answer to each request until the parent closes."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the timeouts that we replace
    known = importlib.import_module(scorers).SCORERS
    connection = socket.socket(fileno=descriptor)
    requests = connection.makefile("rb")
    _limit_resources()
    attempts = _watch()
    connection.sendall(b"ready\n")
    for request in requests:
        number, name, *arguments = json.loads(request)
        # Should SIGKILL not come from a parent that hangs itself, one of these two ends the worker.
        _limit_cpu_seconds(2 * timeout + 1)
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
        answer = _answer(known[name], arguments, attempts)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(json.dumps({"number": number, **answer}).encode() + b"\n")


def _answer(
    scorer: Callable[[str, str, str], float], arguments: list[str], attempts: list[str]
) -> dict[str, float | str]:
    """{"reward"}, or {"error"} where the scorer raised or tried what it must not."""
    attempts.clear()
    try:
        reward = float(scorer(*arguments))
        if not 0 <= reward <= 1:  # NaN too
            raise ValueError(f"the reward {reward} is not between 0 and 1")
    except MemoryError:  # what fills the memory may stay in a cache, and the next response would pay
        os._exit(OUT_OF_MEMORY)
    except (Exception, SystemExit) as error:  # a bad response or answer must not cost the queue
        return {"error": f"{type(error).__name__}: {str(error)[:ERROR_CHARACTERS]}"}
    if attempts:  # many scorers catch what _watch raises
        return {"error": f"an attempt that is not allowed: {', '.join(attempts)[:ERROR_CHARACTERS]}"}
    return {"reward": reward}


def _die_with_parent() -> None:
    """Linux only; elsewhere an idle orphan reads the end of the stream, and a busy one has its alarm.

    The kernel means the thread that started this process: a thread of the pool, which ends with the pool.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
        libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _limit_resources() -> None:
    """No writing of files, no core dumps, no further process, and the memory: hard limits, which cannot be raised."""
    sys.dont_write_bytecode = True
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(kind, (0, 0))
    statistics = Path("/proc/self/statm")
    if not statistics.exists():  # not Linux
        return
    used = int(statistics.read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = used + MEMORY_BYTES
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_cpu_seconds(seconds: float) -> None:
    """Of one response, by all threads together."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


def _watch() -> list[str]:
    """From here on Python refuses REFUSED, to write files, and to read others than the program's; notes each attempt."""
    attempts: list[str] = []
    roots = {sys.prefix, sys.base_prefix, *filter(None, sys.path)}
    readable = tuple(os.path.realpath(root) + os.sep for root in roots)

    def refuse(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            is_read = isinstance(path, str | bytes) and not flags & WRITES  # a number is a descriptor
            if is_read and os.path.realpath(os.fsdecode(path)).startswith(readable):
                return
        elif not event.startswith(REFUSED):
            return
        attempts.append(" ".join([event, *map(str, arguments[:1])]))
        raise PermissionError(f"{event} is not allowed while a response is scored")

    sys.addaudithook(refuse)
    return attempts
