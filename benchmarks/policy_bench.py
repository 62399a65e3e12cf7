"""What the benchmarks of the policy share: its checkpoint, its ranks, a clock, and medians with their spread."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_on_ranks
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_fec.config import OptimizerConfig, PolicyConfig, load_config
from megatron_fec.policy.device import device
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.step import Policy, build_policy

DEADLINE = 1800.0  # seconds for all repeats on CPU ranks
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 8192}
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The policy that is measured."""

    model_dir: str
    vocab_size: int
    settings: PolicyConfig
    name: str = ""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-7))

    @property
    def model_ranks(self) -> int:
        sizes = self.settings
        return sizes.tensor_parallel * sizes.pipeline_parallel * sizes.context_parallel


def subject(
    config: Path | None, overrides: Sequence[str], folder: Path, *, sizes: dict[str, int] | None = None
) -> Subject:
    """Model and layout of a configuration; without one, a small random Qwen2 in fp32 on one rank, or as `sizes` says."""
    if config is not None:
        loaded = load_config(config, list(overrides))
        chosen: Any = load_hf_config(loaded.model.path)
        return Subject(
            model_dir=loaded.model.path,
            vocab_size=chosen.vocab_size,
            settings=loaded.policy,
            name=f"{loaded.model.path} of {config}",
        )
    values: dict[str, Any] = SIZES | (sizes or SMALL)
    hf_config = Qwen2Config(**values, tie_word_embeddings=False)
    torch.manual_seed(0)
    Qwen2ForCausalLM(hf_config).save_pretrained(folder)
    return Subject(
        model_dir=str(folder),
        vocab_size=hf_config.vocab_size,
        settings=PolicyConfig(precision="fp32", distributed_optimizer=False, micro_batch_tokens=1024),
        name=f"random Qwen2, {', '.join(f'{name} {value}' for name, value in (sizes or SMALL).items())}",
    )


def build(chosen: Subject) -> Policy:
    layout = initialize_parallel(chosen.settings, seed=0)
    return build_policy(
        chosen.model_dir,
        chosen.settings,
        chosen.optimizer,
        layout=layout,
        temperature=1.0,
        total_steps=1,
        vocab_size=chosen.vocab_size,
    )


def on_ranks(chosen: Subject, job: Callable[[Policy], Any], *, data_parallel: int = 1) -> list[Any] | None:
    """job(policy) of every rank; under torchrun this process is one of them, and all but rank 0 get None."""
    if "RANK" in os.environ:
        result = job(build(chosen))
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, result)
        return results if dist.get_rank() == 0 else None
    if torch.cuda.is_available():
        raise SystemExit(
            "error: on GPUs the ranks are torchrun's. Start with torchrun --nproc-per-node GPUS FILE ..."
        )
    return run_on_ranks(
        chosen.model_ranks * data_parallel, lambda rank: job(build(chosen)), deadline=DEADLINE
    )


def seconds_of(work: Callable[[], object]) -> float:
    """CPU seconds of this rank, which other load on the machine does not change; on a GPU elapsed ones."""
    dist.barrier()
    if device().type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat; every repeat runs all of them, one after the other, each repeat beginning with another.

    The first round fills caches and allocators and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            elapsed = seconds_of(works[name])
            if repeat:
                seconds[name].append(elapsed)
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def folder_for_model() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="megatron_fec_bench_")
