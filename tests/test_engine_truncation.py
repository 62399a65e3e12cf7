"""Top-k and top-p of the native engine against their words in float64, and against transformers in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native_fixtures import (
    STOP,
    TEMPERATURE,
    VOCABULARY,
    WORDS,
    assert_same,
    by_transformers,
    left_over,
    on_layout,
    sample,
)

from megatron_fec.policy import sampling
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.rollout.engine import Sampling
from megatron_fec.rollout.native_engine import NativeEngine
from megatron_fec.types import Prompt


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, WORDS, seed=5)
    return folder


@pytest.mark.parametrize("layout", [(1, 1, False), (2, 1, False), (2, 2, True)])
def test_truncated_samples_are_those_of_transformers(model_dir: Path, layout: tuple[int, int, bool]) -> None:
    truncations: list[dict[str, Any]] = [{"top_k": 6}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.6}]
    results = on_layout(model_dir, lambda policy: [sample(policy, **one) for one in truncations], layout)
    assert all(result == results[0] for result in results)
    whole = by_transformers(model_dir)
    for found, truncation in zip(results[0], truncations, strict=True):
        expected = by_transformers(model_dir, **truncation)
        assert [ids for ids, _ in expected] != [ids for ids, _ in whole]
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1.0, 3), (0.8, 0), (0.8, 20), (0.3, 5), (1e-9, 0), (0.999999, 36)]
)
def test_truncation_leaves_the_distribution_of_its_words(top_p: float, top_k: int) -> None:
    logits = 3 * torch.randn(200, VOCABULARY, generator=torch.Generator().manual_seed(1)).double()
    found = sampling.truncated(logits, top_p=top_p, top_k=top_k).softmax(-1)
    for row, probabilities in zip(found.tolist(), logits.softmax(-1).tolist(), strict=True):
        assert row == pytest.approx(left_over(probabilities, top_p, top_k), abs=1e-13)


def test_drawn_tokens_follow_the_truncated_distribution() -> None:
    """20,000 draws at evenly spaced uniform numbers: the counts are the probabilities to within one."""
    count = 20_000
    logits = 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(2))
    numbers = ((torch.arange(count) + 0.5) / count).double()[:, None]
    chosen, logprobs = sampling._draw(logits.expand(count, -1), numbers, TEMPERATURE, top_p=0.8, top_k=20)
    wanted = left_over((logits[0].double() / TEMPERATURE).softmax(0).tolist(), 0.8, 20)
    assert 1 < sum(p > 0 for p in wanted) < 20
    counts = torch.bincount(chosen, minlength=VOCABULARY).tolist()
    assert counts == pytest.approx([count * p for p in wanted], abs=1)
    assert logprobs.exp().tolist() == pytest.approx([wanted[i] for i in chosen.tolist()], rel=1e-12)


def test_equal_logits_share_one_fate_and_none_is_not_touched() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, -1.0, 1.0]]).double()
    for found in (sampling.truncated(logits, top_k=2), sampling.truncated(logits, top_p=0.6)):
        assert found.isfinite().tolist() == [[False, True, True, True, False, True]]
    assert sampling.truncated(logits, top_k=6, top_p=1.0) is logits
    assert sampling.truncated(logits) is logits
    assert sampling.truncated(torch.full((1, 3), torch.nan), top_p=0.5, top_k=2).isnan().all()


def test_the_engine_passes_the_truncation_on() -> None:
    seen: dict[str, Any] = {}
    whole = Sampling(group_size=2, max_response_tokens=3, temperature=1.0, seed=1)
    prompts = [Prompt(prompt_id=0, text="", token_ids=(1,), answer="", verifier="")]

    def noting(prompts: Sequence[Sequence[int]], **settings: Any) -> Any:
        seen.update(settings)
        return [[STOP] for _ in prompts], [[-0.5] for _ in prompts]

    tokenizer = SimpleNamespace(eos_token_id=STOP, decode=lambda ids, skip_special_tokens: "")
    engine = NativeEngine(
        sample=noting, tokenizer=tokenizer, data_parallel_rank=0, data_parallel_size=1, is_leader=True
    )
    engine.refit(iter(()), version=1)
    engine.generate(prompts, replace(whole, top_p=0.8, top_k=20))
    assert (seen["top_p"], seen["top_k"]) == (0.8, 20)
    engine.generate(prompts, whole)
    assert (seen["top_p"], seen["top_k"]) == (1.0, 0)
