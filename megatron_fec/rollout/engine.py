"""The rollout engine as the trainer sees it, and what every engine shares: request seeds, the gather, the guards."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_fec.seeds import derive_seed
from megatron_fec.types import Prompt, Sample, SampleGroup

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LOGPROB_SLACK = 1e-4  # fp32 log-softmax of a near-certain token may end a few ulp above 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one call of `generate` samples."""

    group_size: int
    max_response_tokens: int
    temperature: float
    seed: int  # already derived for this step
    # The top_k most probable tokens (0 is all), then the fewest of them whose probability, renewed over these, reaches
    # top_p; in that order, as in vLLM. Training samples from the whole distribution.
    top_p: float = 1.0
    top_k: int = 0


class Engine(Protocol):
    """Samples responses with the weights of the last refit; all methods are collective over the whole world.

    An engine starts without weights, and is again without after free(keep_weights=False): then refit comes before
    generate. What takes its memory and is not needed to load weights, the KV cache, it takes at generate and not before:
    the weights that the refit reads may have left by then.
    """

    def refit(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Loads full tensors under Hugging Face names. Every rank iterates the whole stream: it holds collectives.

        An engine in the trainer's process reads the tensors where they lie in device memory, one at a time, with no copy
        between processes: CUDA IPC and buckets are for engines in other processes.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[SampleGroup]:
        """One group for each prompt in the order of `prompts`, the complete list on every rank.

        Log-probs are those of the distribution that was sampled: at the temperature, over the true vocabulary, or over
        what top_k and top_p leave of it.
        """
        ...

    def free(self, *, keep_weights: bool) -> None:
        """Gives memory back until the next refit or generate.

        keep_weights: generate may come next; they then wait in host memory. Else refit must.
        """
        ...

    def asleep_bytes(self) -> int:
        """What torch counts as allocated on this rank's device, and this engine has given back."""
        ...


def vllm_is_available() -> bool:
    """Whether vLLM is installed; a broken installation is not hidden, it fails at import."""
    return importlib.util.find_spec("vllm") is not None


def true_vocab_size(tokenizer: Any) -> int:
    """Ids that mean something: checkpoints pad the embedding beyond the tokenizer's last id.

    Trainer and engine both leave the other rows out, so that they speak of the same distribution.
    """
    return max(tokenizer.get_vocab().values()) + 1


def request_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """One seed for each prompt, the same in every engine layout; a prompt that occurs again gets another."""
    seen: Counter[int] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(derive_seed(seed, "prompt", prompt.prompt_id, seen[prompt.prompt_id]))
        seen[prompt.prompt_id] += 1
    return seeds


def engine_weights(
    weights: Iterable[tuple[str, Tensor]], *, vocab_size: int, is_tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """The stream without rows beyond the true vocabulary, and with the head of a tied model.

    vLLM's CPU head keeps a packed copy of its own, which only a tensor named lm_head.weight renews.
    """
    head: Tensor | None = None
    for name, tensor in weights:
        if name in (EMBEDDING, HEAD):
            tensor = tensor[:vocab_size]
        if name == EMBEDDING and is_tied:
            head = tensor
        if not (name == HEAD and is_tied):
            yield name, tensor
    if head is not None:
        yield HEAD, head


def gather_groups(
    local: Sequence[SampleGroup],
    indices: Sequence[int],
    *,
    prompts: Sequence[Prompt],
    is_leader: bool,
    group: dist.ProcessGroup | None = None,
) -> list[SampleGroup]:
    """All groups in the order of `prompts`, on every rank; one collective.

    local, indices: this engine's groups and their positions in `prompts`. Each engine's leader contributes them, the
    other ranks contribute nothing. `group` is the default group when None; without torch.distributed, the world is
    this process.
    """
    packed = PackedGroups.of([group.samples for group in local], indices) if is_leader else None
    parts: list[PackedGroups | None] = [packed]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, packed, group=group)
    groups = {index: samples for part in parts if part is not None for index, samples in part.samples()}
    missing = [i for i in range(len(prompts)) if i not in groups]
    if missing or len(groups) != len(prompts):
        raise RuntimeError(
            f"the engines returned {len(groups)} of {len(prompts)} prompts; missing: {missing[:8]}."
        )
    return [SampleGroup(prompt=prompt, samples=groups[i]) for i, prompt in enumerate(prompts)]


def check_groups(
    groups: Sequence[SampleGroup], *, weight_version: int, group_size: int, max_lag: int = 0
) -> None:
    """Raises RuntimeError naming prompt and sample of the first response that must not be trained on.

    max_lag: how many versions the weights that sampled may be older.
    """
    for group in groups:
        fault = group_fault(group, weight_version=weight_version, group_size=group_size, max_lag=max_lag)
        if fault:
            raise RuntimeError(f"{fault}.")


def group_fault(group: SampleGroup, *, weight_version: int, group_size: int, max_lag: int = 0) -> str:
    """What is wrong with a group, naming prompt and sample; "" if nothing."""
    name = f"prompt {group.prompt.prompt_id}"
    if len(group.samples) != group_size:
        return (
            f"{name}: the engine returned {len(group.samples)} samples, not rollout.group_size={group_size}"
        )
    for number, sample in enumerate(group.samples):
        fault = _fault(sample, weight_version, max_lag)
        if fault:
            return f"{name}, sample {number}: {fault}"
    return ""


def _fault(sample: Sample, weight_version: int, max_lag: int) -> str:
    """What is wrong with a sample, "" if nothing."""
    if not weight_version - max_lag <= sample.weight_version <= weight_version:
        return f"sampled by weights of version {sample.weight_version}, the policy is at version {weight_version}"
    if not sample.token_ids:
        return "the response has no token"
    if len(sample.logprobs) != len(sample.token_ids):
        return f"{len(sample.logprobs)} log-probs for {len(sample.token_ids)} tokens"
    for position, logprob in enumerate(sample.logprobs):
        if not math.isfinite(logprob) or logprob > LOGPROB_SLACK:
            return f"log-prob {logprob} of token {position} is not a finite number of at most 0"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedGroups:
    """Groups as flat arrays: pickling them is a copy of memory, not a walk over millions of Python numbers."""

    indices: list[int]  # of the groups
    group_sizes: list[int]
    lengths: list[int]  # of the samples, group after group
    token_ids: NDArray[np.int32]  # of all samples, end to end
    logprobs: NDArray[np.float64]
    logprob_counts: list[int]  # equal to lengths unless the engine is broken, which check_groups must see
    texts: list[str]
    truncated: list[bool]
    versions: list[int]

    @staticmethod
    def of(groups: Sequence[Sequence[Sample]], indices: Sequence[int]) -> PackedGroups:
        assert len(groups) == len(indices)
        samples = [sample for group in groups for sample in group]
        return PackedGroups(
            indices=list(indices),
            group_sizes=[len(group) for group in groups],
            lengths=[len(sample.token_ids) for sample in samples],
            token_ids=np.array([t for sample in samples for t in sample.token_ids], dtype=np.int32),
            logprobs=np.array([p for sample in samples for p in sample.logprobs], dtype=np.float64),
            logprob_counts=[len(sample.logprobs) for sample in samples],
            texts=[sample.text for sample in samples],
            truncated=[sample.is_truncated for sample in samples],
            versions=[sample.weight_version for sample in samples],
        )

    def samples(self) -> list[tuple[int, tuple[Sample, ...]]]:
        """(index, samples) of each group."""
        token_ids = _split(self.token_ids, self.lengths)
        logprobs = _split(self.logprobs, self.logprob_counts)
        flat = [
            Sample(token_ids=t, logprobs=p, text=text, is_truncated=is_truncated, weight_version=version)
            for t, p, text, is_truncated, version in zip(
                token_ids, logprobs, self.texts, self.truncated, self.versions, strict=True
            )
        ]
        ends = np.cumsum(self.group_sizes, dtype=np.int64).tolist()
        sizes = self.group_sizes
        return [(i, tuple(flat[end - n : end])) for i, n, end in zip(self.indices, sizes, ends, strict=True)]


def _split(flat: NDArray[np.int32] | NDArray[np.float64], lengths: list[int]) -> list[tuple]:
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    return [tuple(flat[end - n : end].tolist()) for n, end in zip(lengths, ends, strict=True)]
