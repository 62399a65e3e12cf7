"""Engines as training and evaluation build them, and the weights of a checkpoint for one that has no policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from megatron_fec.policy.device import device
from megatron_fec.policy.precision_check import in_bf16
from megatron_fec.policy.sampling import sample_responses
from megatron_fec.policy.step import Policy
from megatron_fec.rollout.engine import Engine, true_vocab_size
from megatron_fec.rollout.native_engine import NativeEngine
from megatron_fec.rollout.server_engine import ServerEngine
from megatron_fec.rollout.weight_transfer import GlooSender, Sender

INDEX_FILE = "model.safetensors.index.json"


def native_engine(policy: Policy, tokenizer: Any) -> Engine:
    """The policy itself samples."""
    return NativeEngine(
        sample=partial(_sample_in_bf16, policy),
        tokenizer=tokenizer,
        # Context ranks sample prompts of their own: a decoded position cannot be split over them.
        data_parallel_rank=dist.get_rank(policy.layout.data_group),
        data_parallel_size=dist.get_world_size(policy.layout.data_group),
        is_leader=policy.layout.reports_metrics,
    )


def _sample_in_bf16(policy: Policy, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]]]:
    """sample_responses; a decoded position has too few rows for products in FP8."""
    with in_bf16(policy):
        return sample_responses(policy, *args, **kwargs)


def vllm_engine(
    model_dir: Path,
    tokenizer: Any,
    *,
    precision: str,
    tensor_parallel: int,
    max_model_len: int,
    gpu_memory_utilization: float,
    seed_per_request: bool,
    is_fp8: bool = False,
) -> Engine:
    """vLLM with the architecture of model_dir; its weights come with the first refit."""
    # Imported only here: vLLM is an optional extra, and importing it takes seconds.
    from megatron_fec.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        model_dir=str(model_dir),
        vocab_size=true_vocab_size(tokenizer),
        dtype="float32" if precision == "fp32" else "bfloat16",
        tensor_parallel=tensor_parallel,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        seed_per_request=seed_per_request,
        is_fp8=is_fp8,
    )


def server_engine(folder: Path, model_dir: Path, tokenizer: Any, *, say: Callable[[str], None]) -> Engine:
    """The rollout servers of RUN/engines, which load their own architecture of model_dir."""
    return ServerEngine(
        folder,
        vocab_size=true_vocab_size(tokenizer),
        is_tied=bool(AutoConfig.from_pretrained(model_dir, trust_remote_code=False).tie_word_embeddings),
        make_sender=partial(_sender, device()),
        say=say,
    )


def _sender(own: torch.device, address: str, world_size: int, timeout: float) -> Sender:
    """From the device that holds the policy: NCCL between GPUs, gloo between CPUs."""
    if own.type == "cpu":
        return GlooSender(address=address, world_size=world_size, timeout=timeout)
    # Imported only here: vLLM is an optional extra, and importing it takes seconds.
    from megatron_fec.rollout.vllm_transfer import NcclSender

    return NcclSender(world_size=world_size, timeout=timeout, device=own)


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: those of its index, or all where it has none."""
    index = model_dir / INDEX_FILE
    if index.is_file():
        return [
            model_dir / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    return sorted(model_dir.glob("*.safetensors"))


def checkpoint_weights(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of a Hugging Face folder, for Engine.refit; each rank reads for itself."""
    for path in weight_files(model_dir):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
