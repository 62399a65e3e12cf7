"""Log-probability and entropy with their gradient: ours beside the peers, one command, one table.

    .venv/bin/python benchmarks/token_stats.py [--quick] [--out DIR] [--device cuda]

On the CPU: TP 1 and 2, ranks are forked gloo processes of one thread. On CUDA: TP 1 in this process, or one
rank per GPU under torchrun. Writes token_stats.md and .png, with --quick token_stats_quick.md and .png.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the tests' reference and ranks

from implementations import ALIGNER, VERL, Implementation, Peers, find_peers, for_dtype
from measure import REFERENCE_ROWS, Measurement, Workload, measure
from ranks import run_on_ranks
from report import Run, Setting, copy_bandwidth, markdown, save_plot
from vocab_reference import vocab_reference

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".peers"  # a folder apart: the peers bring other versions of omegaconf and antlr4
VOCABULARY = 152064  # of Qwen2.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEADLINE = 1200.0  # seconds for one setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    tokens: int  # for memory and errors
    timed_tokens: int
    repeats: int
    copied: tuple[str, ...]  # peers that are also given an fp32 copy of bf16 logits


# The heap that keeps freed memory grows with the timed tokens: at 1024, two ranks of NeMo-Aligner took 25 GB.
FULL = Size(tokens=1024, timed_tokens=512, repeats=7, copied=(VERL, ALIGNER))
CUDA = Size(tokens=4096, timed_tokens=4096, repeats=20, copied=(VERL, ALIGNER))
QUICK = Size(tokens=1024, timed_tokens=256, repeats=3, copied=(VERL,))


def workload(tokens: int, vocabulary: int, dtype: torch.dtype) -> Workload:
    """Logits 4 * randn, random labels and coefficients, and the float64 reference of the first rows."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocabulary, generator=generator).mul_(4.0).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    grad_logprobs = torch.randn(tokens, generator=generator)
    grad_entropy = 0.3
    rows = min(REFERENCE_ROWS, tokens - 1)  # NeMo-Aligner leaves the last token out of the entropy
    exact = vocab_reference(
        logits[:rows],
        labels[:rows],
        vocab_size=vocabulary,
        grad_logprobs=grad_logprobs[:rows],
        grad_entropy=torch.full((rows,), grad_entropy),
    )
    return Workload(
        logits=logits,
        labels=labels,
        grad_logprobs=grad_logprobs,
        grad_entropy=grad_entropy,
        logprobs=exact.logprobs,
        entropy=exact.entropy,
        logprobs_gradient=exact.logprobs_gradient,
        entropy_gradient=exact.entropy_gradient,
    )


def on_cpu(
    implementations: list[Implementation],
    work: Workload,
    *,
    tensor_parallel: int,
    timed_tokens: int,
    repeats: int,
) -> dict[str, Measurement]:
    """Rank 0's measurements, with the largest error and memory of all ranks."""
    run = functools.partial(
        measure,
        implementations=implementations,
        work=work,
        device="cpu",
        timed_tokens=timed_tokens,
        repeats=repeats,
    )
    first, *others = run_on_ranks(tensor_parallel, run, deadline=DEADLINE)
    for name in first:
        for other in others:
            first[name] = _worst(first[name], other[name])
    return first


def _worst(mine: Measurement, other: Measurement) -> Measurement:
    entropy = None if mine.entropy_error is None else max(mine.entropy_error, other.entropy_error or 0.0)
    return replace(
        mine,
        extra_memory=max(mine.extra_memory, other.extra_memory),
        logprobs_error=max(mine.logprobs_error, other.logprobs_error),
        entropy_error=entropy,
        is_within_tolerance=mine.is_within_tolerance and other.is_within_tolerance,
        gradient_error=max(mine.gradient_error, other.gradient_error),
    )


def cpu_settings(peers: Peers, size: Size) -> list[Setting]:
    settings = []
    for dtype_name, dtype in DTYPES.items():
        work = workload(size.tokens, VOCABULARY, dtype)
        for ranks in (1, 2):
            chosen = for_dtype(peers.implementations, dtype, size.copied)
            results = on_cpu(
                chosen,
                work,
                tensor_parallel=ranks,
                timed_tokens=size.timed_tokens,
                repeats=size.repeats,
            )
            settings.append(Setting(tensor_parallel=ranks, dtype=dtype_name, results=results))
            print(f"measured TP {ranks}, {dtype_name}", file=sys.stderr, flush=True)
    return settings


def cuda_settings(peers: Peers, size: Size) -> list[Setting]:
    """One TP size: 1 in this process, or the number of ranks that torchrun started; rank 0 reports."""
    if "RANK" in os.environ:
        dist.init_process_group("nccl")
    else:
        store = f"file://{tempfile.mkdtemp()}/store"
        dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    settings = []
    for dtype_name, dtype in DTYPES.items():
        work = workload(size.tokens, VOCABULARY, dtype)
        chosen = for_dtype(peers.implementations, dtype, size.copied)
        results = measure(
            rank, chosen, work, device="cuda", timed_tokens=size.timed_tokens, repeats=size.repeats
        )
        settings.append(Setting(tensor_parallel=ranks, dtype=dtype_name, results=results))
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats: under three minutes")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the table and the plot"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here. Use --device cpu.")
    warnings.simplefilter("ignore")  # of the peers, about optional packages
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # before anything starts a pool of threads, which would not survive the forks
    size = QUICK if args.quick else {"cpu": FULL, "cuda": CUDA}[args.device]
    sys.path.insert(0, str(PEERS))
    peers = find_peers()
    bandwidth = None
    if args.device == "cuda":
        settings, bandwidth = cuda_settings(peers, size), copy_bandwidth()
        if dist.get_rank() != 0:
            return
    else:
        settings = cpu_settings(peers, size)
    run = Run(
        device=args.device,
        versions=peers.versions,
        missing=peers.missing,
        tokens=size.tokens,
        timed_tokens=size.timed_tokens,
        vocabulary=VOCABULARY,
        repeats=size.repeats,
        reference_rows=REFERENCE_ROWS,
        copy_bandwidth=bandwidth,
    )
    text = markdown(settings, run)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "token_stats" + ("_quick" if args.quick else "") + ("_cuda" if args.device == "cuda" else "")
    (args.out / f"{name}.md").write_text(text)
    save_plot(settings, run, args.out / f"{name}.png")
    print(text)
    print(f"written: {args.out / name}.md and .png")


if __name__ == "__main__":
    main()
