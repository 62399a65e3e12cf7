"""Peak memory of each part of a step: `memory/KIND/PART` in metrics.jsonl, in GiB, the largest of all ranks.

| kind          | is                                                                                                    |
|---------------|-------------------------------------------------------------------------------------------------------|
| host_gib      | resident host memory of this process (VmHWM), pinned memory included; since the process began where the |
|               | kernel cannot start a new count (/proc/self/clear_refs)                                                 |
| allocated_gib | GPU memory in tensors of this process                                                                    |
| reserved_gib  | GPU memory that torch holds for tensors, the cached rest included                                        |

GPU kinds count what torch allocates, vLLM's pool in this process included, less what a sleeping engine has given back;
CUDA contexts and NCCL's buffers come on top. Parts are those of the timers. A save comes after its step's row is written,
so its peak stands in the next row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

GIB = float(1 << 30)
HOST, ALLOCATED, RESERVED = "host_gib", "allocated_gib", "reserved_gib"
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_HOST_PEAK = "5"  # written there, sets VmHWM to the present VmRSS (man 5 proc)


class PeakMemory:
    """Highest use by part; parts may lie within one another."""

    def __init__(self, asleep_bytes: Callable[[], int] = lambda: 0) -> None:
        """asleep_bytes: of GPU memory that torch counts and that is given back (Engine.asleep_bytes)."""
        self._asleep_bytes = asleep_bytes
        self._open: list[dict[str, float]] = []  # peaks so far of the parts under way, the outermost first
        self._peaks: dict[str, dict[str, float]] = {}  # by part

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Watches the block, also when it raises; a part that comes again keeps its highest peak."""
        self._settle()
        self._open.append({})
        try:
            yield
        finally:
            self._settle()
            _raise_to(self._peaks.setdefault(part, {}), self._open.pop())

    def take(self) -> dict[str, float]:
        """Metrics of the parts that have ended since the last call, on this rank."""
        taken = {
            f"memory/{kind}/{part}": value / GIB
            for part, peaks in self._peaks.items()
            for kind, value in peaks.items()
        }
        self._peaks = {}
        return taken

    def _settle(self) -> None:
        """Gives the peak since the last call to all parts under way, and starts a new one."""
        if self._open:
            peak = _peak_bytes(self._asleep_bytes())
            for peaks in self._open:
                _raise_to(peaks, peak)
        _reset_peaks()


def _raise_to(peaks: dict[str, float], others: dict[str, float]) -> None:
    for kind, value in others.items():
        peaks[kind] = max(value, peaks.get(kind, 0.0))


def _peak_bytes(asleep: int) -> dict[str, float]:
    peaks = {HOST: float(_status_bytes("VmHWM"))}
    if torch.cuda.is_available():
        peaks[ALLOCATED] = float(torch.cuda.max_memory_allocated() - asleep)
        peaks[RESERVED] = float(torch.cuda.max_memory_reserved() - asleep)
    return peaks


def _reset_peaks() -> None:
    with suppress(OSError):  # gVisor has no such file: the docstring says what the figure is then
        CLEAR_REFS.write_text(RESET_HOST_PEAK)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) << 10
