"""CPU seconds (GPU: elapsed), peak memory, collectives and errors of each implementation on one rank."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from implementations import Implementation
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REFERENCE_ROWS = 32  # rows compared with the float64 reference
WARM_UP_TOKENS = (8, 12)
COUNTED_TOKENS = 64  # tokens of the call whose collectives are counted
LOGPROB_TOLERANCE = (2e-6, 5e-7)  # absolute, relative: of log-probabilities and entropies
CONTRIBUTION = {  # position, among the arguments of a c10d operation, of what this rank contributes
    "allreduce_": 0,
    "_allgather_base_": 1,
    "allgather_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "alltoall_base_": 1,
    "alltoall_": 1,
    "broadcast_": 0,
    "reduce_": 0,
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """loss = sum(grad_logprobs * logprobs) + grad_entropy * sum(entropy), the same on every rank.

    grad_entropy is one number, as an entropy bonus is: NeMo-Aligner offers the mean entropy only.
    """

    logits: Tensor  # [T, V] fp32 or bf16, all columns
    labels: Tensor  # [T] int64
    grad_logprobs: Tensor  # [T] fp32
    grad_entropy: float
    logprobs: Tensor  # [rows] float64 reference, as the next three
    entropy: Tensor  # [rows]
    logprobs_gradient: Tensor  # [rows, V] of the first term of the loss
    entropy_gradient: Tensor  # [rows, V] of the second


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    seconds: float  # fastest call, forward and backward: CPU seconds of this rank, GPU: elapsed
    extra_memory: float  # highest use above the logits, as a multiple of their bytes; the gradient counts
    collectives: tuple[int, int]  # forward, backward
    bytes_per_token: tuple[float, float]  # contributed by this rank to collectives, forward and backward
    logprobs_error: float  # largest absolute one
    entropy_error: float | None  # None: this implementation has no entropy
    is_within_tolerance: bool  # both, by LOGPROB_TOLERANCE
    gradient_error: float  # largest absolute one / largest entry


def measure(
    rank: int,
    implementations: Sequence[Implementation],
    work: Workload,
    *,
    device: str,
    timed_tokens: int,
    repeats: int,
) -> dict[str, Measurement]:
    """Measurements by name, on one rank of the default process group, all of which is tensor parallel."""
    gc.freeze()  # the thousands of modules that the peers import need no search before each measurement
    if device == "cpu":
        return_freed_memory()
    torch._dynamo.config.suppress_errors = True  # without a C++ compiler, what peers compile runs eagerly
    torch._inductor.config.compile_threads = 1  # type: ignore[attr-defined] # no pool of processes in a fork
    world_size = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    group = parallel_state.get_tensor_model_parallel_group()
    assert isinstance(group, dist.ProcessGroup)
    width = work.logits.shape[1] // world_size
    columns = slice(rank * width, (rank + 1) * width)
    bench = _Bench(work, columns, group, device)
    checks = {item.name: bench.check(item, columns) for item in implementations}
    counts = {item.name: bench.count(item) for item in implementations}
    if device == "cpu":
        keep_freed_memory()
    seconds = {item.name: float("inf") for item in implementations}
    for repeat in range(repeats + 1):  # the first round fills the allocator and is not counted
        for item in implementations:
            elapsed = bench.seconds(item, timed_tokens)
            seconds[item.name] = min(seconds[item.name], elapsed) if repeat else seconds[item.name]
    return {name: Measurement(seconds=seconds[name], **checks[name], **counts[name]) for name in seconds}


class _Bench:
    """One rank's shard, refilled before each call because some implementations overwrite it."""

    def __init__(self, work: Workload, columns: slice, group: dist.ProcessGroup, device: str) -> None:
        self.work = work
        self.group = group
        self.device = device
        self.pristine = work.logits[:, columns].to(device)
        self.buffer = self.pristine.clone(memory_format=torch.contiguous_format)
        self.labels = work.labels.to(device)
        self.grad_logprobs = work.grad_logprobs.to(device)

    def fresh_logits(self, tokens: int | None = None) -> Tensor:
        self.buffer.copy_(self.pristine)
        return self.buffer[:tokens].detach().requires_grad_()

    def forward(self, item: Implementation, logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss, log-probabilities, entropy."""
        tokens = len(logits)
        logprobs, entropy = item.forward(logits, self.labels[:tokens], self.group)
        loss = (self.grad_logprobs[:tokens] * logprobs).sum()
        if entropy is not None:
            loss = loss + self.work.grad_entropy * entropy.sum()
        return loss, logprobs, entropy

    def check(self, item: Implementation, columns: slice) -> dict[str, Any]:
        """Peak memory and errors. Two small calls first, so that torch.compile is done with all sizes."""
        for tokens in WARM_UP_TOKENS:
            warm = self.fresh_logits(tokens)
            torch.autograd.grad(self.forward(item, warm)[0], warm)
            del warm
        logits = self.fresh_logits()
        results: list[Tensor | None] = []

        def call() -> None:
            loss, logprobs, entropy = self.forward(item, logits)
            results.extend([*torch.autograd.grad(loss, logits), logprobs.detach(), entropy])

        extra = extra_bytes(call, self.device) / logits.nbytes
        gradient, logprobs, entropy = results
        if entropy is not None and item.entropy_rows is not None:
            with torch.no_grad():
                entropy = item.entropy_rows(self.fresh_logits()[: len(self.work.entropy)])
        return {"extra_memory": extra, **self._errors(gradient, logprobs, entropy, columns)}

    def _errors(
        self, gradient: Tensor | None, logprobs: Tensor | None, entropy: Tensor | None, columns: slice
    ) -> dict[str, Any]:
        assert gradient is not None and logprobs is not None
        work, rows = self.work, len(self.work.logprobs)
        expected = work.logprobs_gradient
        pairs = [(logprobs, work.logprobs)]
        if entropy is not None:
            expected = expected + work.entropy_gradient
            pairs.append((entropy, work.entropy))
        errors = [(result[:rows].detach().double().cpu() - exact).abs() for result, exact in pairs]
        absolute, relative = LOGPROB_TOLERANCE
        limits = [absolute + relative * exact.abs() for _, exact in pairs]
        off = (gradient[:rows].double().cpu() - expected[:, columns]).abs().max()
        return {
            "logprobs_error": errors[0].max().item(),
            "entropy_error": errors[1].max().item() if entropy is not None else None,
            "is_within_tolerance": all(
                bool((error <= limit).all()) for error, limit in zip(errors, limits, strict=True)
            ),
            "gradient_error": (off / expected.abs().max()).item(),
        }

    def count(self, item: Implementation) -> dict[str, Any]:
        """Number of collectives and bytes per token; a group of one rank sends nothing."""
        logits = self.fresh_logits(COUNTED_TOKENS)
        with CollectiveCounter() as forward:
            loss = self.forward(item, logits)[0]
        with CollectiveCounter() as backward:
            torch.autograd.grad(loss, logits)
        is_sent = self.group.size() > 1
        sent = [is_sent * counter.bytes / len(logits) for counter in (forward, backward)]
        return {"collectives": (forward.calls, backward.calls), "bytes_per_token": (sent[0], sent[1])}

    def seconds(self, item: Implementation, tokens: int) -> float:
        logits = self.fresh_logits(tokens)
        gc.collect()
        dist.barrier(self.group)
        if self.device == "cpu":
            start = time.process_time()
            torch.autograd.grad(self.forward(item, logits)[0], logits)
            return time.process_time() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.autograd.grad(self.forward(item, logits)[0], logits)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000


class CollectiveCounter(TorchDispatchMode):
    """Counts c10d operations and the bytes this rank contributes, under whatever Python name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            given = args[CONTRIBUTION[func.overloadpacket.__name__]]
            self.calls += 1
            self.bytes += sum(x.nbytes for x in _flatten([given]))
        return func(*args, **(kwargs or {}))


def _flatten(items: Sequence[Any]) -> list[Tensor]:
    return [x for item in items for x in ([item] if isinstance(item, Tensor) else _flatten(item))]


def extra_bytes(call: Callable[[], None], device: str) -> int:
    """Highest memory use during call() above the use before it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the highest VmRSS, to the present VmRSS
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) << 10


def return_freed_memory() -> None:
    """Tensors of 1 MB and more go back to the system when freed: the resident size is what is held."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def keep_freed_memory() -> None:
    """As torch's allocator does on a GPU; else each call pays page faults for each of its buffers."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
