"""What of the policy lies in device memory in each phase of a step; the rest waits in pinned host memory, or nowhere.

policy.options.offload says what may leave: `optimizer` the optimizer's state (master weights and moments), `all` also the
gradient buffers and the weights.

| phase    | entered by           | weights | gradients | optimizer | beside them on the device                    |
|----------|----------------------|---------|-----------|-----------|----------------------------------------------|
| refit    | prepare_for_inference| here    | freed     | on host   | the engine's weights, no KV cache             |
| generate | prepare_for_inference| on host | freed     | on host   | the engine's weights and its KV cache         |
| logprobs | finish_inference     | here    | freed     | on host   | activations of one forward; the engine sleeps |
| train    | prepare_for_training | here    | here      | here      | activations; the engine sleeps                |
| save     | prepare_for_saving   | here    | freed     | here      | the engine sleeps                             |

Where the policy itself samples (rollout.engine=native) it keeps its weights. Gradients are not copied: an update begins
by filling their buffers with 0. A phase first sends away what it does not need, then fetches what it lacks.

Parameters, megatron-core's buckets and the optimizer's shards are views into shared memory, so that memory is emptied and
filled again in place (Tensor.untyped_storage().resize_); no tensor is replaced. That is why megatron-core's own
MegatronOptimizer.offload_to_cpu is not used: it gives each tensor other memory, which parts an fp32 shard from the
parameter whose view it is, and takes unpinned memory anew in each step. Its buffers' offload_to_cpu knows no parameters
outside the buffers, which is all of them under the plain optimizer.

The host memory of a kind is allocated when the kind first leaves, before the engine is built, with room for the moments that
Adam's first update will make. It is registered with CUDA instead of coming from torch's pinned allocator, which rounds up
to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, UntypedStorage

from megatron_fec.errors import ConfigError
from megatron_fec.policy.device import device, release_cached_memory
from megatron_fec.policy.step import Policy

Kind = Literal["weights", "gradients", "optimizer"]
Phase = Literal["refit", "generate", "logprobs", "train", "save"]
MOVED: dict[str, tuple[Kind, ...]] = {  # by policy.options.offload
    "none": (),
    "optimizer": ("optimizer",),
    "all": ("gradients", "optimizer", "weights"),
}
NEEDED: dict[Phase, tuple[Kind, ...]] = {
    "refit": ("weights",),
    "generate": (),
    "logprobs": ("weights",),
    "train": ("weights", "gradients", "optimizer"),
    "save": ("weights", "optimizer"),
}
ALIGNMENT = 512  # bytes; of a storage in host memory, as in torch's allocator


class Offload:
    """Moves this rank's part of the policy; no collective. Begins in the phase `train`."""

    def __init__(self, policy: Policy, offload: str, *, policy_samples: bool) -> None:
        """offload: policy.options.offload. policy_samples: the engine reads the policy's own weights."""
        self._policy = policy
        self._moved = MOVED[offload]
        self._kept: tuple[Kind, ...] = ("weights",) if policy_samples else ()
        self._away: dict[Kind, list[tuple[UntypedStorage, int]]] = {}  # storages and their bytes
        self._host: dict[Kind, Tensor] = {}  # [bytes] uint8

    def enter(self, phase: Phase) -> None:
        """Afterwards the device holds what the phase needs, and of what may move nothing else."""
        needed = NEEDED[phase] + self._kept
        leaving: list[Kind] = [kind for kind in self._moved if kind not in needed and kind not in self._away]
        for kind in leaving:
            self._send(kind)
        if leaving:
            release_cached_memory()
        coming: list[Kind] = [kind for kind in self._away if kind in needed]
        for kind in coming:
            self._fetch(kind)

    def _send(self, kind: Kind) -> None:
        for chunk in self._policy.chunks if kind == "weights" else ():
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                assert group.param_gather_handle is None, (
                    "hf_weights, which comes first, waits for every gather"
                )
        storages = [(storage, storage.nbytes()) for storage in storages_of(self._policy, kind)]
        if kind != "gradients":
            for place, storage in self._places(kind, storages):
                place.copy_(_bytes_of(storage), non_blocking=True)
        _synchronize()  # before the memory of a copy under way, or of a kernel or collective, is given back
        for storage, _ in storages:
            storage.resize_(0)
        self._away[kind] = storages

    def _fetch(self, kind: Kind) -> None:
        storages = self._away.pop(kind)
        for storage, num_bytes in storages:
            storage.resize_(num_bytes)
        if kind == "gradients":
            for storage, _ in storages:
                _bytes_of(storage).zero_()
        else:
            for place, storage in self._places(kind, storages):
                _bytes_of(storage).copy_(place, non_blocking=True)
        _synchronize()

    def _places(
        self, kind: Kind, storages: Iterable[tuple[UntypedStorage, int]]
    ) -> Iterator[tuple[Tensor, UntypedStorage]]:
        """(its place in host memory, storage) of each."""
        placed, end = [], 0
        for storage, num_bytes in storages:
            placed.append((slice(end, end + num_bytes), storage))
            end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if kind not in self._host or self._host[kind].nbytes < end:
            if kind in self._host:
                _release(self._host.pop(kind))
            self._host[kind] = host_memory(end + _bytes_to_come(self._policy, kind), kind)
        return ((self._host[kind][place], storage) for place, storage in placed)


def storages_of(policy: Policy, kind: Kind) -> list[UntypedStorage]:
    """The device memory of a kind, each piece once and in the same order at every call."""
    weights, gradients = _weights(policy), _gradients(policy)
    if kind == "weights":
        return list(_unique(weights).values())
    if kind == "gradients":
        return list(_unique(gradients).values())
    # An fp32 shard of the distributed optimizer is a view of the weights; fp32 parameters are their own master weights.
    others = _unique(weights).keys() | _unique(gradients).keys()
    found = _unique(_optimizer_tensors(policy))
    return [storage for key, storage in found.items() if key not in others]


def host_memory(num_bytes: int, kind: str) -> Tensor:
    """[num_bytes] uint8 in host memory, pinned where there is a GPU."""
    try:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        if device().type == "cuda" and num_bytes:
            torch.cuda.check_error(_cuda_runtime().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
    except RuntimeError as error:
        raise ConfigError(
            f"policy.options.offload needs {num_bytes:,} bytes of pinned host memory for the {kind} of this rank, and "
            f"the system gave none: {str(error).splitlines()[0]}. Give the job more memory (and `ulimit -l unlimited`), "
            "or set policy.options.offload to optimizer or none."
        ) from error
    return memory


def _release(memory: Tensor) -> None:
    if memory.is_pinned():
        torch.cuda.check_error(_cuda_runtime().cudaHostUnregister(memory.data_ptr()))


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()


def _weights(policy: Policy) -> Iterator[Tensor]:
    """Parameters, and the buffers of which they are views: those have room between them."""
    for chunk in policy.chunks:
        yield from chunk.parameters()
        yield from (buffer.param_data for buffer in _buffers(chunk) if buffer.param_data is not None)


def _gradients(policy: Policy) -> Iterator[Tensor]:
    for chunk in policy.chunks:
        yield from (parameter.main_grad for parameter in chunk.parameters())  # type: ignore[attr-defined]
        yield from (buffer.grad_data for buffer in _buffers(chunk))


def _buffers(chunk: Any) -> list[Any]:
    return chunk.buffers + chunk.expert_parallel_buffers


def _optimizer_tensors(policy: Policy) -> Iterator[Tensor]:
    for outer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        inner = outer.optimizer
        if inner is None:  # a rank without parameters of this kind
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes_to_come(policy: Policy, kind: Kind) -> int:
    """At most, of Adam's moments that its first update will make."""
    if kind != "optimizer":
        return 0
    outers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    inners: list[Any] = [outer.optimizer for outer in outers if outer.optimizer is not None]
    without = [
        parameter
        for inner in inners
        for group in inner.param_groups
        for parameter in group["params"]
        if parameter not in inner.state
    ]
    return sum(2 * (4 * parameter.numel() + ALIGNMENT) for parameter in without)


def _unique(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """The storages of those on the device, by identity; those that are empty stay with their kind."""
    storages = (t.untyped_storage() for t in tensors if t.device.type == device().type)
    return {storage._cdata: storage for storage in storages}


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def _synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
