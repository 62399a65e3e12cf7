"""What the engine in the trainer's processes and the engine in a server share, so that both sample the same."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig
from vllm import RequestOutput, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind

from megatron_fec.rollout.engine import Sampling
from megatron_fec.types import Sample

# Weights are scaled by tensor and activations by token, as they come; `fp8` itself is for checkpoints that are quantized.
QUANTIZATION = "fp8_per_tensor"
CPU_SEQUENCES = 128  # decoded at a time
CPU_BLOCK = 128  # tokens of a KV block of vLLM's CPU backend
CPU_KV_BYTES = (64 << 20, 1 << 30)  # least and most; without a limit vLLM takes most of the machine's memory


def llm_arguments(
    model_dir: str,
    *,
    vocab_size: int,  # ids with a token; rows of the embedding beyond them are left out
    dtype: Literal["float32", "bfloat16"],
    tensor_parallel: int,
    max_model_len: int,
    gpu_memory_utilization: float,  # unused on CPU
    sleeps: bool,  # gives its GPU memory to the trainer between calls
    is_fp8: bool,  # the products of the layers; every refit quantizes anew
) -> dict[str, Any]:
    """Arguments of vllm.LLM that decide what is sampled, and what differs between a GPU and a CPU."""
    hf_config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    return {
        "model": model_dir,
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel,
        "max_model_len": max_model_len,
        "load_format": "dummy",
        "quantization": QUANTIZATION if is_fp8 else None,
        "hf_overrides": {"vocab_size": vocab_size},
        "generation_config": "vllm",  # stop at the tokenizer's eos only, no sampling defaults of the checkpoint
        "logprobs_mode": "processed_logprobs",  # at the temperature, as the trainer computes them
        **_device_settings(hf_config, dtype, tensor_parallel, max_model_len, gpu_memory_utilization, sleeps),
    }


def sampling_params(sampling: Sampling, seed: int | None) -> SamplingParams:
    """Of one prompt. seed: sample j of its group gets seed + j; None draws from the engine's own stream."""
    return SamplingParams(
        n=sampling.group_size,
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,  # 0 is off there too
        max_tokens=sampling.max_response_tokens,
        logprobs=0,  # of the sampled token
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def samples_of(output: RequestOutput, weight_version: int) -> tuple[Sample, ...]:
    """The group of one prompt, by the number of the sample."""
    samples = []
    for completion in sorted(output.outputs, key=lambda completion: completion.index):
        assert isinstance(completion.logprobs, FlatLogprobs)
        samples.append(
            Sample(
                token_ids=tuple(completion.token_ids),
                logprobs=tuple(completion.logprobs.logprobs),
                text=completion.text,
                is_truncated=completion.finish_reason == "length",
                weight_version=weight_version,
            )
        )
    return tuple(samples)


def check_environment() -> None:
    """vLLM reads these once and silently does the wrong thing without them, so they are checked, not set."""
    needed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine must live in the process that asked for it
    if not torch.cuda.is_available():
        needed["TORCH_COMPILE_DISABLE"] = "1"  # else the first sample compiles C++ for half a minute
    for name, value in needed.items():
        if os.environ.get(name) != value:
            raise RuntimeError(
                f"{name}={os.environ.get(name)} must be {value} for rollout.engine=vllm. "
                "Source launch/node_env.sh before starting Python."
            )


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Before a refit on the CPU: lets vLLM pack the experts' new weights, which it does only where it builds a kernel.

    On a GPU its reload converts them by itself. Seen in vLLM 0.32, which else computes with weights in another order.
    """
    if torch.cuda.is_available():
        return
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    for method in methods:
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # type: ignore[union-attr]


@contextmanager
def global_state_kept() -> Iterator[None]:
    """The trainer's random states and its torch.set_num_threads survive; vLLM changes all of them in process."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    set_num_threads = torch.set_num_threads
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_num_threads = set_num_threads


def _device_settings(
    hf_config: PretrainedConfig,
    dtype: str,
    tensor_parallel: int,
    max_model_len: int,
    gpu_memory_utilization: float,
    sleeps: bool,
) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": gpu_memory_utilization, "enable_sleep_mode": sleeps}
    heads = hf_config.num_attention_heads
    head_dim = (
        getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    )  # not every family has the field
    kv_heads = max(1, hf_config.num_key_value_heads // tensor_parallel)
    tokens = CPU_SEQUENCES * -(-max_model_len // CPU_BLOCK) * CPU_BLOCK
    size = 2 * hf_config.num_hidden_layers * kv_heads * head_dim * tokens * getattr(torch, dtype).itemsize
    least, most = CPU_KV_BYTES
    return {
        "worker_cls": "megatron_fec.rollout.vllm_cpu_worker.RunCPUWorker",
        "enforce_eager": True,
        "max_num_seqs": CPU_SEQUENCES,
        "kv_cache_memory_bytes": min(max(size, least), most),
    }
