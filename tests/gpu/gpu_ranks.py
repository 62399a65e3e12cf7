"""Run a function of a test module on GPU ranks: processes of torchrun, because CUDA does not survive a fork.

On a machine without a GPU the same ranks run on CPU with gloo, by which the functions can be tried out.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parent.parent
DEADLINE = 300.0  # seconds; imports and CUDA's start are most of it


def on_gpus(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(rank, *args) for each rank]; args and results are JSON, function is at the top of its module."""
    with tempfile.TemporaryDirectory() as folder:
        started = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        name = (function.__module__, function.__name__)
        command = [sys.executable, *started, str(HERE / "gpu_ranks.py"), folder, *name, json.dumps(args)]
        shell = ["bash", "-c", 'source "$0"; exec "$@"', str(ROOT / "launch" / "node_env.sh"), *command]
        paths = os.pathsep.join(str(path) for path in (ROOT, TESTS, HERE))
        environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def main(folder: str, module: str, function: str, args: str) -> None:
    # Imported here: pytest imports this module to collect the tests, which takes no time then.
    import torch.distributed as dist

    from megatron_fec.policy.device import backend, prepare_device

    prepare_device()
    dist.init_process_group(backend())
    result = getattr(importlib.import_module(module), function)(dist.get_rank(), *json.loads(args))
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
