"""Weights in buckets: how they are laid out, checked and sent over gloo. The NCCL half is in vllm_transfer.py.

A bucket is one flat piece of memory, so that a model travels in few large messages. The receiver computes the checksum of
the bytes that arrived and compares it with the sender's, which came by the signed connection.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from megatron_fec.errors import ConfigError

BUCKET_BYTES = 256 << 20
ALIGNMENT = 8  # bytes; a tensor of any dtype may start there, and the checksum reads words of this size
CHUNK_WORDS = 1 << 22  # of one pass of the checksum; bounds its memory
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Some tensors, one after the other; kept in host memory for engines that start again."""

    number: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    checksum: int
    data: Tensor  # [bytes] uint8, on the CPU

    def description(self) -> dict[str, Any]:
        """All but the data."""
        return {
            "number": self.number,
            "names": self.names,
            "dtypes": self.dtypes,
            "shapes": self.shapes,
            "checksum": self.checksum,
        }


class Sender(Protocol):
    """The trainer's end of a connection to one engine, all its tensor-parallel ranks included."""

    meeting: dict[str, Any]  # what the engine must know to meet it; goes by the signed connection

    def connect(self) -> None:
        """Waits for the engine."""
        ...

    def send(self, data: Tensor) -> None:
        """Returns when the bytes have left; RuntimeError after the deadline."""
        ...

    def close(self) -> None: ...


def checksum(data: Tensor) -> int:
    """Of [bytes] uint8, on the device that holds it; a change of any single word changes it.

    The sum of all 8-byte words, each times an odd number of its position, modulo 2^64.
    """
    words = data.view(torch.int64)
    total = 0
    for start in range(0, words.numel(), CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS]
        positions = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=data.device)
        total += int((chunk * ((positions * GOLDEN) | 1)).sum())
    return total % (1 << 64)


def combined(checksums: Iterable[int]) -> int:
    """Of a whole update, by the order of its buckets."""
    return checksum(torch.tensor([c - (1 << 63) for c in checksums], dtype=torch.int64).view(torch.uint8))


def layout(dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> tuple[list[tuple[int, int]], int]:
    """(start, end) of each tensor in bytes, and the length of the bucket."""
    places, end = [], 0
    for dtype, shape in zip(dtypes, shapes, strict=True):
        size = math.prod(shape) * getattr(torch, dtype).itemsize
        places.append((end, end + size))
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return places, end


def make_buckets(weights: Iterable[tuple[str, Tensor]], *, limit: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Buckets of about `limit` bytes; a larger tensor has one of its own."""
    held: list[tuple[str, Tensor]] = []
    size = number = 0
    for name, tensor in weights:
        if held and size + tensor.nbytes > limit:
            yield _bucket(number, held)
            held, size, number = [], 0, number + 1
        held.append((name, tensor.detach()))
        size += tensor.nbytes
    if held:
        yield _bucket(number, held)


def unpacked(
    data: Tensor, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
) -> list[tuple[str, Tensor]]:
    """The tensors of a bucket, as views of its data."""
    places, _ = layout(dtypes, shapes)
    return [
        (name, data[start:end].view(getattr(torch, dtype)).view(list(shape)))
        for name, dtype, shape, (start, end) in zip(names, dtypes, shapes, places, strict=True)
    ]


def check_other_gpu(own: str, trainers: str) -> None:
    """Refuses a server on the GPU of the trainer's sending rank; both are CUDA's UUIDs.

    NCCL has no two ranks on one GPU. CUDA IPC could bring the weights over, but a server never sleeps: its weights and its
    KV cache would stay beside the training copy for the whole step. The engine in the trainer's process shares the GPU.
    """
    if own == trainers:
        raise ConfigError(
            f"this rollout server has GPU {own}, on which the trainer's rank 0 trains, and NCCL has no two ranks on one "
            "GPU. Give the server a GPU of its own by CUDA_VISIBLE_DEVICES, or share this one by rollout.engine=vllm."
        )


class GlooSender:
    """Over TCP, for engines on CPU. Listens on `address` only."""

    def __init__(self, *, address: str, world_size: int, timeout: float) -> None:
        self._address, self._world_size, self._timeout = address, world_size, timeout
        listener = socket.create_server((address, 0))
        port: int = listener.getsockname()[1]
        self.meeting: dict[str, Any] = {"master_address": address, "master_port": port}
        self._store = TCPStore(
            address,
            port,
            world_size,
            True,
            timedelta(seconds=timeout),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._group: dist.ProcessGroup | None = None

    def connect(self) -> None:
        self._group = gloo_group(
            self._store, rank=0, size=self._world_size, address=self._address, timeout=self._timeout
        )

    def send(self, data: Tensor) -> None:
        assert self._group is not None
        self._group.broadcast(data, 0).wait()

    def close(self) -> None:
        self._group = None


def gloo_group(store: Store, *, rank: int, size: int, address: str, timeout: float) -> Any:
    """A group beside the default one, whose sockets are bound to `address`."""
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout)
    return dist.ProcessGroupGloo(PrefixStore("fec", store), rank, size, options)  # pyright: ignore[reportArgumentType]


def _bucket(number: int, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
    dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors]
    shapes = [list(tensor.shape) for _, tensor in tensors]
    places, length = layout(dtypes, shapes)
    data = torch.zeros(length, dtype=torch.uint8, device=tensors[0][1].device)
    for (_, tensor), (start, end) in zip(tensors, places, strict=True):
        data[start:end] = tensor.contiguous().view(-1).view(torch.uint8)
    return Bucket(
        number=number,
        names=[name for name, _ in tensors],
        dtypes=dtypes,
        shapes=shapes,
        checksum=checksum(data),  # before the copy to the host: it covers that copy too
        data=data.cpu(),
    )
