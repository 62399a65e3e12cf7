"""vLLM's CPU worker, with shared memory that belongs to one run.

vLLM names the shared memory of a tensor-parallel engine after the rendezvous of its ranks. Under an external launcher
that is "env://" for every run, so two runs on a machine would share one name, and a run that was killed would leave it
behind and stop every later one ("create shm in SHMManager failed. errno: 17").
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import torch.distributed as dist
from vllm.v1.worker.cpu_worker import CPUWorker


class RunCPUWorker(CPUWorker):
    def init_device(self) -> None:
        """Collective over all ranks. Nothing stays in /dev/shm under a name once the ranks have opened it."""
        name = [uuid.uuid4().hex]
        if dist.is_initialized():
            dist.broadcast_object_list(name, src=0)
            self.distributed_init_method = (
                f"file://{name[0]}"  # only its name is read: the ranks have met already
            )
        super().init_device()
        if dist.is_initialized():
            dist.barrier()  # every engine's ranks have opened theirs
        for path in Path("/dev/shm").glob(f"{os.environ['VLLM_DIST_IDENT']}-*"):
            path.unlink(missing_ok=True)  # the mappings stay; the memory goes with the processes
