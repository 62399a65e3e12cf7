"""The engine for machines without vLLM: the training model samples, through a function that the policy floor gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fec.rollout.engine import Sampling, gather_groups, request_seeds
from megatron_fec.types import Prompt, Sample, SampleGroup

# (prompts, uniforms=, stop_id=, temperature=, top_p=, top_k=) -> ids and log-probs of one response each; collective over
# TP and PP.
SampleFunction = Callable[..., tuple[list[list[int]], list[list[float]]]]


class NativeEngine:
    """An `Engine` (rollout/engine.py) without weights of its own: what the policy holds is what samples."""

    def __init__(
        self,
        *,
        sample: SampleFunction,
        tokenizer: Any,  # decode(ids, skip_special_tokens=) and eos_token_id
        data_parallel_rank: int,
        data_parallel_size: int,
        is_leader: bool,  # True on one rank of each data-parallel rank: it brings the groups to the gather
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("model.path: the tokenizer has no eos_token, so no response would end. Set one.")
        self._sample = sample
        self._tokenizer = tokenizer
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._is_leader = is_leader
        self._version: int | None = None

    def refit(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Notes the version. No rank touches the stream: the weights are the policy's already."""
        self._version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[SampleGroup]:
        """Data-parallel rank r samples prompts r, r + size, ...; then all ranks gather all groups."""
        if self._version is None:
            raise RuntimeError(
                "NativeEngine.generate before refit, or after free(keep_weights=False): the samples need a version. "
                "Call refit first."
            )
        indices = range(self._rank, len(prompts), self._size)
        seeds = request_seeds(prompts, sampling.seed)
        samples = self._samples(
            [prompts[i] for i in indices for _ in range(sampling.group_size)],
            [seeds[i] + number for i in indices for number in range(sampling.group_size)],
            sampling,
            self._version,
        )
        local = [
            SampleGroup(prompt=prompts[i], samples=tuple(samples[start : start + sampling.group_size]))
            for i, start in zip(indices, range(0, len(samples), sampling.group_size), strict=True)
        ]
        return gather_groups(local, indices, prompts=prompts, is_leader=self._is_leader)

    def free(self, *, keep_weights: bool) -> None:
        """No memory to give: the KV cache lives inside generate, and the weights are the policy's."""
        if not keep_weights:
            self._version = None

    def asleep_bytes(self) -> int:
        return 0

    def _samples(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, version: int
    ) -> list[Sample]:
        """One sample for each (prompt, seed)."""
        token_ids, logprobs = self._sample(
            [prompt.token_ids for prompt in prompts],
            uniforms=_uniforms(seeds, sampling.max_response_tokens),
            stop_id=self._tokenizer.eos_token_id,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )
        return [
            Sample(
                token_ids=tuple(ids),
                logprobs=tuple(values),
                text=self._tokenizer.decode(ids, skip_special_tokens=True),
                is_truncated=ids[-1] != self._tokenizer.eos_token_id,
                weight_version=version,
            )
            for ids, values in zip(token_ids, logprobs, strict=True)
        ]


def _uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """[N, length] fp64 in [0, 1), row i from seeds[i] alone: the same in every layout."""
    rows = [
        torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.float64)
