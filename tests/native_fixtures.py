"""The sampler of the native engine on a layout of gloo ranks, and the same definition by transformers."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_fec.config import OptimizerConfig, PolicyConfig
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.sampling import sample_responses
from megatron_fec.policy.step import Policy, build_policy

torch.set_num_threads(1)  # before transformers runs here: its threads would not survive the fork
WORDS = list(string.digits + string.punctuation)[:35]  # with a space and the end a vocabulary of 37
VOCABULARY, STOP = 37, 36
LENGTH = 11  # response tokens
TEMPERATURE = 0.8
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6], [3, STOP, 4, 1], [20] * 5, [2, 1, 2, 1]]
Response = tuple[list[int], list[float]]
# tensor, pipeline, sequence parallelism
LAYOUTS = [(1, 1, False), (2, 1, False), (1, 2, False), (2, 2, False), (2, 1, True), (2, 2, True)]


def uniforms(rows: int, length: int = LENGTH) -> Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def on_layout(
    model_dir: Path,
    job: Callable[[Policy], Any],
    layout: tuple[int, int, bool] = (1, 1, False),
    *,
    data_parallel: int = 1,
    precision: str = "fp32",
) -> list[Any]:
    """job(policy) of every rank, in rank order."""
    tensor, pipeline, is_sequence_parallel = layout
    sizes: dict[str, Any] = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    config = PolicyConfig(sequence_parallel=is_sequence_parallel, precision=precision, **sizes)

    def on_rank(rank: int) -> Any:
        places = initialize_parallel(config, seed=3)
        settings = {"temperature": TEMPERATURE, "total_steps": 9, "vocab_size": VOCABULARY}
        return job(build_policy(str(model_dir), config, OptimizerConfig(lr=1e-2), layout=places, **settings))

    return run_on_ranks(tensor * pipeline * data_parallel, on_rank)


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    numbers: Tensor | None = None,
    **truncation: Any,
) -> list[Response]:
    numbers = uniforms(len(prompts)) if numbers is None else numbers
    ids, logprobs = sample_responses(
        policy, prompts, uniforms=numbers, stop_id=STOP, temperature=TEMPERATURE, **truncation
    )
    return list(zip(ids, logprobs, strict=True))


def left_over(probabilities: list[float], top_p: float, top_k: int) -> list[float]:
    """The distribution after top-k and then top-p, from their words, in float64."""
    ranked = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[: top_k or None]
    total, passed, kept = sum(probabilities[i] for i in ranked), 0.0, []
    for i in ranked:
        if passed >= top_p:
            break
        kept.append(i)
        passed += probabilities[i] / total
    share = sum(probabilities[i] for i in kept)
    return [p / share if i in kept else 0.0 for i, p in enumerate(probabilities)]


@torch.no_grad()
def by_transformers(
    model_dir: Path, prompts: Sequence[Sequence[int]] = PROMPTS, *, top_p: float = 1.0, top_k: int = 0
) -> list[Response]:
    """The same definition without a cache: one row at a time, the whole sequence again for each token."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    responses = []
    for prompt, numbers in zip(prompts, uniforms(len(prompts)).tolist(), strict=True):
        ids: list[int] = []
        logprobs: list[float] = []
        for number in numbers:
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, -1, :VOCABULARY].double()
            probabilities = torch.softmax(logits / TEMPERATURE, dim=0).tolist()
            if top_p < 1 or top_k:
                probabilities = left_over(probabilities, top_p, top_k)
            chosen, passed = 0, probabilities[0]
            while passed <= number:
                chosen += 1
                passed += probabilities[chosen]
            ids.append(chosen)
            logprobs.append(torch.tensor(probabilities[chosen], dtype=torch.float64).log().item())
            if chosen == STOP:
                break
        responses.append((ids, logprobs))
    return responses


def assert_same(responses: Sequence[Response], expected: Sequence[Response]) -> None:
    assert [ids for ids, _ in responses] == [ids for ids, _ in expected]
    for (_, logprobs), (_, wanted) in zip(responses, expected, strict=True):
        assert logprobs == pytest.approx(wanted, abs=1e-5)  # fp32 layers in another order of operations
