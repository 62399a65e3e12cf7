"""A step's groups and rewards: what is reported, and which groups dynamic sampling keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from ranks import run_on_ranks
from torch import Tensor

from megatron_fec.collection import Collector, _metrics
from megatron_fec.config import RolloutConfig
from megatron_fec.rollout.engine import Sampling
from megatron_fec.tasks.verifier import Verifier
from megatron_fec.types import Prompt, Sample, SampleGroup


def test_rollout_metrics_by_hand():
    prompt = Prompt(prompt_id=0, text="", token_ids=(1,), answer="", verifier="math")

    def sample(length: int, is_truncated: bool) -> Sample:
        tokens = (1,) * length
        return Sample(
            token_ids=tokens,
            logprobs=(0.0,) * length,
            text="",
            is_truncated=is_truncated,
            weight_version=0,
        )

    groups = [SampleGroup(prompt=prompt, samples=(sample(2, False), sample(6, True)))] * 2
    assert _metrics(groups, [[0.0, 1.0], [0.0, 0.0]]) == {
        "reward": 0.25,
        "group_pass_rate": 0.5,
        "group_signal_rate": 0.5,
        "response_length": 4.0,
        "response_tokens": 16.0,
        "truncated": 0.5,
    }


class PlannedEngine:
    """Answers 1 as often as the prompt's text says, and 2 otherwise; remembers the seeds it was given."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def refit(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None: ...

    def free(self, *, keep_weights: bool) -> None: ...

    def asleep_bytes(self) -> int:
        return 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[SampleGroup]:
        self.seeds.append(sampling.seed)
        texts = [["1"] * int(p.text) + ["2"] * (sampling.group_size - int(p.text)) for p in prompts]
        return [
            SampleGroup(
                prompt=p,
                samples=tuple(
                    Sample(
                        token_ids=(5,),
                        logprobs=(-0.5,),
                        text=rf"\boxed{{{text}}}",
                        is_truncated=False,
                        weight_version=3,
                    )
                    for text in row
                ),
            )
            for p, row in zip(prompts, texts, strict=True)
        ]


def collected(
    rank: int, plan: list[list[int]], max_refills: int
) -> tuple[list[int], int, dict[str, float], list[int]]:
    """Ids of the kept groups, prompts drawn, metrics, seeds; plan: right answers of 2 by prompt and batch."""
    engine = PlannedEngine()
    settings = RolloutConfig(prompts_per_step=3, group_size=2, max_refills=max_refills)
    verifier = Verifier(workers=1, timeout=20.0)

    def draw(batch: int) -> list[Prompt]:
        return [
            Prompt(prompt_id=10 * batch + i, text=str(right), token_ids=(1,), answer="1", verifier="math")
            for i, right in enumerate(plan[batch])
        ]

    try:
        collector = Collector(engine=engine, verifier=verifier, settings=settings)
        collection = collector.collect(draw, version=3, seed=77)
        rewards, metrics = collector.rewards(collection)
    finally:
        verifier.close()
    expected = [[1.0] * int(g.prompt.text) + [0.0] * (2 - int(g.prompt.text)) for g in collection.groups]
    assert rewards == expected
    return [g.prompt.prompt_id for g in collection.groups], collection.drawn, metrics, engine.seeds


@pytest.mark.parametrize(
    ("plan", "max_refills", "kept", "drawn"),
    [
        ([[0, 1, 2]], 0, [0, 1, 2], 3),  # off: as they come
        ([[1, 1, 1]], 2, [0, 1, 2], 3),  # nothing to refill
        ([[0, 1, 2], [1, 0, 1]], 2, [1, 10, 12], 6),
        ([[1, 0, 1], [1, 1, 1]], 2, [0, 2, 10], 6),  # one is enough, the rest of the batch is dropped
        ([[0, 2, 0], [1, 0, 2]], 1, [0, 1, 10], 6),  # bounded: the first without signal fill up
    ],
)
def test_which_groups_dynamic_sampling_keeps(
    plan: list[list[int]], max_refills: int, kept: list[int], drawn: int
):
    results = run_on_ranks(2, collected, plan, max_refills)
    assert results[0] == results[1]
    ids, number, metrics, seeds = results[0]
    assert (ids, number) == (kept, drawn)
    assert len(set(seeds)) == len(seeds) == drawn // 3
    assert seeds[0] == 77  # a run without refills samples the same
    flat = [min(right, 2) / 2 for batch in plan[: drawn // 3] for right in batch]
    assert metrics["reward"] == pytest.approx(sum(flat) / len(flat))  # of all that was sampled
    if max_refills:
        right = {10 * b + i: r for b, batch in enumerate(plan) for i, r in enumerate(batch)}
        assert metrics["refills"] == drawn // 3 - 1
        assert metrics["without_signal"] == pytest.approx(sum(right[i] != 1 for i in kept) / 3)
