"""Peak memory by part of a step, on the host for real."""

from __future__ import annotations

import gc

import pytest
import torch

from megatron_fec import memory_log
from megatron_fec.memory_log import GIB, PeakMemory

MIB = 1 << 20


def held(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


def test_a_part_shows_its_own_peak_and_the_whole_shows_the_highest() -> None:
    gc.collect()
    memory = PeakMemory()
    with memory.during("step"):
        with memory.during("large"):
            held(192)
        with memory.during("small"):
            kept = held(32)
        with memory.during("small"):  # again, with less
            pass
    peaks = memory.take()
    assert list(peaks) == ["memory/host_gib/large", "memory/host_gib/small", "memory/host_gib/step"]
    large, small, step = (value * GIB / MIB for value in peaks.values())
    assert step == large
    assert 120 < large - small < 200  # 192 - 32, and what the process did otherwise
    assert kept.nbytes and memory.take() == {}


def test_a_part_that_raises_is_counted() -> None:
    memory = PeakMemory()
    with pytest.raises(KeyError), memory.during("broken"):
        raise KeyError
    assert list(memory.take()) == ["memory/host_gib/broken"]


def test_a_kernel_that_cannot_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_log, "CLEAR_REFS", memory_log.CLEAR_REFS.with_name("no_such_file"))
    held(192)
    memory = PeakMemory()
    with memory.during("whole"):
        pass
    assert memory.take()["memory/host_gib/whole"] * GIB > 192 * MIB
