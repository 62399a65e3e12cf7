"""vLLM's weight-transfer API with buckets and checksums: gloo on CPU, vLLM's NCCL communicator on GPUs.

A backend of vLLM's own (vllm/distributed/weight_transfer) is chosen by name: this module registers "buckets". vLLM's
nccl backend sends the same tensors, but compares nothing with what was sent. The NCCL half follows vLLM's source and has
not been run on a GPU.
"""

from __future__ import annotations

import base64
import ctypes
import multiprocessing
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_process_group
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_fec.rollout.vllm_parts import forget_expert_kernels
from megatron_fec.rollout.weight_transfer import (
    check_other_gpu,
    checksum,
    combined,
    gloo_group,
    layout,
    unpacked,
)

BACKEND = "buckets"
PR_SET_PDEATHSIG = 1  # of Linux: a signal for this process when its parent ends


@dataclass
class BucketInit(WeightTransferInitInfo):
    """How the trainer, rank 0 of the group, is met."""

    backend: str  # gloo | nccl
    world_size: int  # the trainer and the engine's tensor-parallel ranks
    bind: str  # address of this engine's own sockets (gloo)
    timeout: float  # seconds for one bucket
    master_address: str = ""  # these two: gloo
    master_port: int = 0
    nccl_unique_id_b64: str = ""  # these two: nccl
    trainer_gpu: str = ""  # UUID of the one that sends


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """Bucket.description() of one bucket, which the trainer then sends."""

    number: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    checksum: int


class BucketTransferEngine(WeightTransferEngine[BucketInit, BucketUpdate]):
    """The engine's end, in each of its workers. A bucket that did not arrive as it was sent is never loaded."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate
    group: Any = None
    fault = ""  # of the last bucket
    checksums: list[int]  # of the loaded buckets

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        self.shutdown()
        if init_info.backend == "nccl":
            check_other_gpu(_uuid(self.device), init_info.trainer_gpu)
            nccl = NCCLWeightTransferInitInfo(
                rank_offset=1,
                world_size=init_info.world_size,
                nccl_unique_id_b64=init_info.nccl_unique_id_b64,
            )
            self.group = worker_init_process_group(nccl, self.parallel_config)
            return
        store = TCPStore(
            init_info.master_address,
            init_info.master_port,
            init_info.world_size,
            False,
            timedelta(seconds=init_info.timeout),
            wait_for_workers=False,
        )
        self.group = gloo_group(
            store,
            rank=1 + self.parallel_config.rank,
            size=init_info.world_size,
            address=init_info.bind,
            timeout=init_info.timeout,
        )

    def start_weight_update(self) -> None:
        self.checksums = []
        forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketUpdate) -> None:
        _, length = layout(update_info.dtypes, update_info.shapes)
        data = torch.empty(length, dtype=torch.uint8, device=self.device)
        self._broadcast(data)
        arrived = checksum(data)
        self.fault = ""
        if arrived != update_info.checksum:
            self.fault = (
                f"bucket {update_info.number} ({update_info.names[0]} ...) arrived with checksum {arrived:016x}, "
                f"sent with {update_info.checksum:016x}"
            )
            return
        self.model.load_weights(  # pyright: ignore[reportCallIssue] - every vLLM model has it
            unpacked(data, update_info.names, update_info.dtypes, update_info.shapes),
        )
        self.checksums.append(arrived)
        if data.is_cuda:
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        if isinstance(self.group, PyNcclCommunicator):
            self.group.destroy()
        self.group = None

    def _broadcast(self, data: Tensor) -> None:
        if isinstance(self.group, PyNcclCommunicator):
            self.group.broadcast(data, src=0, stream=torch.cuda.current_stream())
            torch.cuda.current_stream().synchronize()
        else:
            self.group.broadcast(data, 0).wait()


class TransferState:
    """vLLM's worker_extension_cls: what collective_rpc asks each worker after a bucket."""

    weight_transfer_engine: BucketTransferEngine

    def bucket_fault(self) -> str:
        return self.weight_transfer_engine.fault

    def update_checksum(self) -> int:
        return combined(self.weight_transfer_engine.checksums)


class NcclSender:
    """A `Sender` (weight_transfer.py) from a GPU of the trainer.

    Both ends meet by NCCL's unique id, which travels by the signed connection: vLLM's other way, a store, is open to
    everyone and holds pickles.
    """

    def __init__(self, *, world_size: int, timeout: float, device: torch.device) -> None:
        self._id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        self.meeting = {
            "nccl_unique_id_b64": base64.b64encode(self._id).decode(),
            "trainer_gpu": _uuid(device),
        }
        self._world_size, self._timeout = world_size, timeout
        self._device = device  # threads have a current device of their own, so it is always named
        self._communicator: PyNcclCommunicator | None = None
        self._stream = torch.cuda.Stream(device)

    def connect(self) -> None:
        with torch.cuda.device(self._device):
            self._communicator = PyNcclCommunicator.from_unique_id_bytes(
                self._id, rank=0, world_size=self._world_size, device=self._device
            )

    def send(self, data: Tensor) -> None:
        """On a stream of its own: a dead engine must not stop the stream that trains."""
        assert self._communicator is not None
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            staged = data.to(self._device)
            self._communicator.broadcast(staged, src=0, stream=self._stream)
            arrived.record(self._stream)
        deadline = time.monotonic() + self._timeout
        while not arrived.query():
            if time.monotonic() > deadline:
                self.close()  # aborts the kernel that waits
                raise RuntimeError(f"NCCL sent nothing within {self._timeout:g} s")
            time.sleep(0.001)

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


# Workers that vLLM spawns import this module by the name of TransferState, and then know the backend. A worker that is
# caught in a collective does not see that its server was killed, and would keep the GPU from the next one.
if multiprocessing.parent_process() is not None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, BucketTransferEngine)
