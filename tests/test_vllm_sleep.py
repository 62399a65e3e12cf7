"""When vLLM sleeps and what it wakes, by the calls that a GPU would get; and that vLLM has these calls and tags.

What sleeping does to memory needs a GPU: tests/gpu/test_train_end_to_end.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from megatron_fec.rollout.engine import Sampling, vllm_is_available

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not vllm_is_available(), reason="vllm is not installed"),
]
SAMPLING = Sampling(group_size=1, max_response_tokens=1, temperature=1.0, seed=0)


class Recorder:
    """The part of vllm.LLM that VllmEngine calls, as a list of what was called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)

    def apply_model(self, function: Any) -> None:
        """What it does is the CPU's alone: tests/test_vllm_experts.py."""

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")


def check_vllm() -> None:
    """It has the tags, the calls and the fields."""
    from vllm import LLM
    from vllm.device_allocator import DEFERRABLE_TAGS, AllocationData
    from vllm.device_allocator.cumem import CuMemAllocator
    from vllm.device_allocator.sleep_mode_backend import CuMemBackend
    from vllm.v1.executor import abstract
    from vllm.v1.worker.gpu_worker import Worker

    from megatron_fec.rollout.vllm_engine import SLEEP_TAGS

    assert set(abstract.SLEEP_TAGS) == set(DEFERRABLE_TAGS) == SLEEP_TAGS  # what a wake may leave asleep
    for call in (LLM.sleep, Worker.sleep, CuMemBackend.suspend):
        assert inspect.signature(call).parameters["level"].default == 1
    for call in (LLM.wake_up, Worker.wake_up, CuMemAllocator.wake_up):
        assert "tags" in inspect.signature(call).parameters
    data = AllocationData((0, 4096, 1, 2), "weights")
    assert data.handle[1] == 4096 and data.is_asleep is False  # what asleep_bytes adds up
    assert "_sleep_saved_buffers" in inspect.getsource(Worker.sleep)  # rotary tables survive level 2
    assert "pointer_to_data" in inspect.getsource(CuMemAllocator.__init__)


def calls_of_a_run(rank: int) -> tuple[list[str], str]:
    """What is called in two steps with a validation between them, and the error of a sample without weights."""
    from megatron_fec.rollout.vllm_engine import VllmEngine

    check_vllm()
    torch.cuda.is_available = lambda: True  # in this rank's process
    engine = object.__new__(VllmEngine)
    engine._llm = recorder = Recorder()  # type: ignore[assignment]
    engine._asleep, engine._is_broken, engine._version = frozenset(), False, None
    engine._engine, engine._num_engines, engine._is_leader = 0, 1, True
    engine._seed_per_request, engine._vocab_size, engine._is_tied = True, 8, False

    def generate() -> None:
        engine.generate([], SAMPLING)
        recorder.calls.append("generate")

    engine.free(keep_weights=False)  # as its constructor does
    for version in (1, 2):
        engine.refit(iter(()), version=version)
        generate()
        generate()
        engine.free(keep_weights=version == 2)
        engine.free(keep_weights=version == 2)
    generate()
    engine.free(keep_weights=False)
    with pytest.raises(RuntimeError) as error:
        generate()
    engine.refit(iter(()), version=3)
    engine.free(keep_weights=False)  # half awake
    return recorder.calls, str(error.value)


def test_weights_wake_for_the_refit_and_the_cache_after_it() -> None:
    ((calls, error),) = run_on_ranks(1, calls_of_a_run)
    step = ["wake weights", "reload_weights", "reset", "wake kv_cache", "generate", "generate"]
    again = [
        "wake weights kv_cache",
        "generate",
        "sleep 2",
        "wake weights",
        "reload_weights",
        "reset",
        "sleep 2",
    ]
    assert calls == ["sleep 2", *step, "sleep 2", *step, "sleep 1", *again]
    assert "after free(keep_weights=False). Call refit first" in error
