"""How fast the nodes talk: all-reduce over all of them, each node with its neighbours, and the GPUs of one node.

NCCL where there are GPUs, gloo elsewhere. The GPU side follows the documentation of torch.distributed; it was run with
gloo only.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented
from torch.multiprocessing.spawn import ProcessContext, start_processes

from megatron_fec.doctor_nodes import FAULT, OK, WARNING, Finding, Node, Nodes

GPU_BYTES, CPU_BYTES = 1 << 30, 1 << 24
WARM_UPS, REPETITIONS = 2, 5
SLOW, VERY_SLOW = 0.5, 0.2  # of the median node


def check_bandwidth(nodes: Nodes, *, seconds: float) -> Finding:
    """One process and one GPU a node: bus bandwidth of an all-reduce over all nodes; slow nodes are named."""
    node = nodes.node
    if node.count == 1:
        return node.finding("bandwidth", OK, "one node: nothing to measure between nodes")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        everyone, rates = _measure(nodes, backend, seconds)
    except RuntimeError as error:  # torch's DistError is one
        text = (
            f"the {backend} all-reduce over {node.count} nodes failed: {str(error).splitlines()[0]} The nodes must reach "
            f"each other by the addresses of one interface. Set {backend.upper()}_SOCKET_IFNAME to it, and look at "
            "NCCL_DEBUG=INFO."
        )
        return node.finding("bandwidth", FAULT, text)
    figure = f"{backend} all-reduce over {node.count} nodes at {everyone / 1e9:.2f} GB/s"
    return judge_bandwidth(node, figure, rates, backend=backend)


def _measure(nodes: Nodes, backend: str, seconds: float) -> tuple[float, list[float]]:
    """(bus bandwidth over all nodes, that of each node with its better neighbour), in bytes a second."""
    node = nodes.node
    # A connection of its own: a wait of the group may outlive this check.
    host, port = nodes.store.host, nodes.store.port
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))
    dist.init_process_group(
        backend,
        store=PrefixStore("bandwidth", store),
        rank=node.rank,
        world_size=node.count,
        timeout=timedelta(seconds=seconds),
    )
    try:
        everyone = _all_reduce_rate(node.count, _device(backend, 0))
        own = everyone if node.count == 2 else _best_neighbour_rate(node.rank, node.count, backend)
        rates: list[float | None] = [None] * node.count
        dist.all_gather_object(rates, own)
    finally:
        dist.destroy_process_group()
    return everyone, [rate or 0.0 for rate in rates]


def judge_bandwidth(node: Node, figure: str, rates: list[float], *, backend: str) -> Finding:
    """rates: bytes a second of each node with its better neighbour; a node far below the median is slow itself."""
    share = rates[node.rank] / statistics.median(rates)
    if share >= SLOW:
        return node.finding("bandwidth", OK, figure)
    # gloo shares the cores with whatever else runs, so that its figures are only a hint.
    level = FAULT if share < VERY_SLOW and backend == "nccl" else WARNING
    return node.finding(
        "bandwidth",
        level,
        f"{figure}; this node reaches {rates[node.rank] / 1e9:.2f} GB/s with its better neighbour, {share:.0%} of the "
        f"median node. Every collective waits for the slowest. Look at its links, NCCL_SOCKET_IFNAME and NCCL_IB_HCA, "
        "or leave it out with --exclude.",
    )


def check_local_gpus(node: Node, *, processes: int, backend: str, seconds: float) -> Finding:
    """Bus bandwidth of an all-reduce over the GPUs of this node, one spawned process each."""
    what = f"{backend} all-reduce over the {processes} GPUs of the node"
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            _local_rank,
            args=(processes, backend, folder, seconds),
            nprocs=processes,
            join=False,
            start_method="spawn",
        )
        assert context is not None
        try:
            _join(context, seconds)
        except Exception as error:
            last = str(error).strip().splitlines()[-1]
            text = f"{what} failed: {last} All GPUs of a node must reach each other. Look at nvidia-smi topo -m and dmesg."
            return node.finding("local-gpus", FAULT, text)
        finally:
            for process in context.processes:
                if process is not None:
                    process.kill()  # does nothing to one that has ended
        rate = json.loads((Path(folder) / "rate").read_text())
    return node.finding("local-gpus", OK, f"{what} at {rate / 1e9:.2f} GB/s")


def _join(context: ProcessContext, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not context.join(timeout=max(0.0, end - time.monotonic())):
        if time.monotonic() >= end:
            raise TimeoutError(f"not done after {seconds:g} s.")


def _local_rank(rank: int, count: int, backend: str, folder: str, seconds: float) -> None:
    device = _device(backend, rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=seconds),
    )
    rate = _all_reduce_rate(count, device)
    if rank == 0:
        (Path(folder) / "rate").write_text(json.dumps(rate))
    dist.destroy_process_group()


def _device(backend: str, index: int) -> torch.device:
    if backend == "nccl":
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    torch.set_num_threads(1)
    return torch.device("cpu")


def _all_reduce_rate(count: int, device: torch.device) -> float:
    """Bus bandwidth in bytes a second, as nccl-tests define it."""
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    tensor = torch.ones(size // 4, dtype=torch.float32, device=device)
    seconds = _timed(lambda: dist.all_reduce(tensor.fill_(1.0)), device)
    if tensor[0].item() != count or tensor[-1].item() != count:
        raise RuntimeError(f"an all-reduce of ones over {count} ranks gave {tensor[0].item()}.")
    return 2 * (count - 1) / count * size / seconds


def _best_neighbour_rate(rank: int, count: int, backend: str) -> float:
    """Bytes a second with the better of both neighbours in the ring: a slow neighbour does not make this one slow."""
    device = _device(backend, 0)
    size = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4
    ours, theirs = (torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(2))
    rates = []
    for partner in neighbours(rank, count):
        if partner is None:
            continue
        send = _sender(ours, theirs, partner, is_first=rank < partner)
        rates.append(2 * size / _timed(send, device))
    return max(rates)


def _sender(
    ours: torch.Tensor, theirs: torch.Tensor, partner: int, *, is_first: bool
) -> Callable[[], object]:
    def exchange() -> None:
        if is_first:
            dist.send(ours, partner)
            dist.recv(theirs, partner)
        else:
            dist.recv(theirs, partner)
            dist.send(ours, partner)

    return exchange


def neighbours(rank: int, count: int) -> list[int | None]:
    """Partners of a rank in three rounds, in each of which the pairs are apart: 0-1 2-3 .., 1-2 3-4 .., last-0."""
    first = rank ^ 1
    second = rank + 1 if rank % 2 else rank - 1
    third = {0: count - 1, count - 1: 0}.get(rank)
    return [first if first < count else None, second if 0 <= second < count else None, third]


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of one call."""
    times = []
    for number in range(WARM_UPS + REPETITIONS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if number >= WARM_UPS:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
