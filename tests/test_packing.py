from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fec.rollout.packing import PackLayout, pack, pack_demonstrations, with_sample_values
from megatron_fec.types import MicroBatch, Prompt, Sample, SampleGroup


def layout(rank: int = 0, size: int = 1, tokens: int = 64, multiple: int = 1) -> PackLayout:
    return PackLayout(
        data_parallel_rank=rank, data_parallel_size=size, micro_batch_tokens=tokens, multiple=multiple
    )


def group(prompt_id: int, prompt_ids: list[int], responses: list[list[int]]) -> SampleGroup:
    prompt = Prompt(prompt_id=prompt_id, text="", token_ids=tuple(prompt_ids), answer="", verifier="")
    samples = [
        Sample(
            token_ids=tuple(ids),
            logprobs=tuple(-0.125 * i for i in ids),  # a power of two: fp32 holds it exactly
            text="",
            is_truncated=False,
            weight_version=0,
        )
        for ids in responses
    ]
    return SampleGroup(prompt=prompt, samples=tuple(samples))


def same(a: MicroBatch, b: MicroBatch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(MicroBatch)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_a_micro_batch_written_by_hand() -> None:
    groups = [group(0, [5, 6], [[4], [7, 8, 9]])]
    packed = pack(groups, layout=layout(multiple=4), prompts_per_update=1, seed=0)
    [[batch]] = with_sample_values(packed, advantages=torch.tensor([[1.5, -2.0]]))
    # Sample 1 is longer and comes first; its last token, 9, is only a label. Two tokens of padding make 8.
    assert batch.tokens.tolist() == [5, 6, 7, 8, 5, 6, 0, 0]
    assert batch.labels.tolist() == [6, 7, 8, 9, 6, 4, -100, -100]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 4
    assert batch.sequence_ids.tolist() == [1, 1, 1, 1, 0, 0, -1, -1]
    assert batch.response_mask.tolist() == [False, True, True, True, False, True, False, False]
    assert batch.advantages.tolist() == [0, -2, -2, -2, 0, 1.5, 0, 0]
    assert batch.rollout_logprobs.tolist() == [0, -0.875, -1, -1.125, 0, -0.5, 0, 0]
    assert batch.old_logprobs is None


@pytest.mark.parametrize(
    ("multiple", "count", "length"), [(1, 3, 13), (2, 4, 12), (4, 4, 12), (5, 5, 7), (8, 8, 7)]
)
def test_an_update_has_a_multiple_of_micro_batches(multiple: int, count: int, length: int) -> None:
    """The tokens are spread over them, so that they get shorter; where sequences run out the rest is empty."""
    groups = [group(0, [5, 6], [[4] * n for n in (6, 5, 6, 5, 6)])]  # 7, 6, 7, 6, 7 positions
    wanted = dataclasses.replace(layout(tokens=14), micro_batch_multiple=multiple)
    [batches] = pack(groups, layout=wanted, prompts_per_update=1, seed=0)
    assert len(batches) == count
    assert {len(batch.tokens) for batch in batches} == {length}
    found = sorted(i for batch in batches for i in set(batch.sequence_ids.tolist()) - {-1})
    assert found == [0, 1, 2, 3, 4]
    assert sum(not batch.response_mask.any() for batch in batches) == max(0, count - 5)


def test_all_micro_batches_can_have_the_length_of_the_budget() -> None:
    groups = [group(0, [5, 6], [[4], [7, 8, 9]])]
    wanted = dataclasses.replace(layout(tokens=24, multiple=4), is_full_length=True)
    [[batch]] = pack(groups, layout=wanted, prompts_per_update=1, seed=0)
    assert len(batch.tokens) == 24 and batch.cu_seqlens.tolist() == [0, 4, 6, 24]
    [[short]] = pack(groups, layout=layout(tokens=24, multiple=4), prompts_per_update=1, seed=0)
    assert len(short.tokens) == 8 and torch.equal(batch.tokens[:8], short.tokens)


def test_the_longest_sequence_may_be_the_padding() -> None:
    [[batch]] = pack([group(0, [5], [[4]])], layout=layout(multiple=8), prompts_per_update=1, seed=0)
    assert batch.cu_seqlens.tolist() == [0, 1, 8]
    assert batch.max_seqlen == 7
    assert batch.response_mask.tolist() == [True] + [False] * 7


def test_no_padding_when_the_length_already_is_a_multiple() -> None:
    [batch] = pack_demonstrations([([1, 2], [3, 4, 5]), ([1], [2, 3, 4, 5])], layout=layout(multiple=4))
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.labels.min() > 0


sizes = st.tuples(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=3, max_size=3))


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(sizes, min_size=4, max_size=4),
    per_update=st.sampled_from([1, 2, 4]),
    size=st.integers(1, 5),
    budget=st.integers(13, 60),
    multiple=st.sampled_from([1, 2, 8]),
)
def test_every_response_token_is_trained_on_once(
    prompts: list[tuple[int, list[int]]], per_update: int, size: int, budget: int, multiple: int
) -> None:
    groups = [
        group(p, list(range(1, length + 1)), [[10 + p + j + i for i in range(n)] for j, n in enumerate(ns)])
        for p, (length, ns) in enumerate(prompts)
    ]
    advantages = torch.arange(12.0).reshape(4, 3) - 5
    ranks = [
        with_sample_values(
            pack(
                groups,
                layout=layout(r, size, budget, multiple),
                prompts_per_update=per_update,
                seed=per_update,
            ),
            advantages=advantages,
        )
        for r in range(size)
    ]
    assert [len(updates) for updates in ranks] == [4 // per_update] * size
    longest = max(len(g.prompt.token_ids) + len(s.token_ids) - 1 for g in groups for s in g.samples)
    seen: list[int] = []
    for u in range(4 // per_update):
        batches = [batch for updates in ranks for batch in updates[u]]
        assert len({len(updates[u]) for updates in ranks}) == 1, "every rank runs equally many forwards"
        assert len({len(batch.tokens) for batch in batches}) == 1, "the pipeline sends one shape"
        assert len(batches[0].tokens) % multiple == 0
        before = len(seen)
        for batch in batches:
            check_layout(batch, budget)
            for number in sorted(set(batch.sequence_ids.tolist()) - {-1}):
                seen.append(number)
                p, g = divmod(number, 3)
                check_sequence(batch, batch.sequence_ids == number, groups[p], g, advantages[p, g].item())
        assert len(seen) - before == per_update * 3
        loads = [sum(int((b.sequence_ids >= 0).sum()) for b in updates[u]) for updates in ranks]
        assert max(loads) - min(loads) <= longest
    assert sorted(seen) == list(range(12))


def check_layout(batch: MicroBatch, budget: int) -> None:
    total = len(batch.tokens)
    starts = batch.cu_seqlens.tolist()
    assert starts[0] == 0 and starts[-1] == total
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    assert min(lengths) > 0 and batch.max_seqlen == max(lengths)
    assert batch.position_ids.tolist() == [i for n in lengths for i in range(n)]
    is_padding = batch.sequence_ids == -1
    assert int((~is_padding).sum()) <= budget
    assert (batch.labels[is_padding] == -100).all() and not batch.response_mask[is_padding].any()
    assert (batch.tokens[is_padding] == 0).all()
    assert batch.advantages[~batch.response_mask].abs().sum() == 0
    assert batch.rollout_logprobs[~batch.response_mask].abs().sum() == 0


def check_sequence(
    batch: MicroBatch, chosen: torch.Tensor, expected: SampleGroup, number: int, advantage: float
) -> None:
    sample = expected.samples[number]
    assert batch.tokens[chosen].tolist() == [*expected.prompt.token_ids, *sample.token_ids[:-1]]
    assert batch.position_ids[chosen].tolist() == list(range(int(chosen.sum())))
    responded = chosen & batch.response_mask
    assert batch.labels[responded].tolist() == list(sample.token_ids)
    assert batch.labels[chosen].tolist() == [*batch.tokens[chosen].tolist()[1:], sample.token_ids[-1]]
    assert batch.rollout_logprobs[responded].tolist() == list(sample.logprobs)
    assert batch.advantages[responded].tolist() == [advantage] * len(sample.token_ids)


def test_packing_again_gives_the_same_tensors() -> None:
    groups = [group(p, [1, 2], [[3] * (1 + (p * 7 + j * 5) % 6) for j in range(4)]) for p in range(6)]
    first, second = (pack(groups, layout=layout(1, 3, 16, 2), prompts_per_update=3, seed=0) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("budget", "count"),
    [(20, 1), (19, 2), (10, 2), (9, 4), (5, 4)],  # four sequences of 5 positions
)
def test_the_fewest_micro_batches_that_fit(budget: int, count: int) -> None:
    batches = pack_demonstrations([([1, 2], [3, 4, 5, 6])] * 4, layout=layout(tokens=budget))
    assert len(batches) == count


def test_the_load_of_micro_batches_is_balanced() -> None:
    pairs = [([1], [2] * n) for n in (9, 8, 2, 1)]
    batches = pack_demonstrations(pairs, layout=layout(tokens=12))
    assert [sorted(set(batch.sequence_ids.tolist()) - {-1}) for batch in batches] == [[0, 3], [1, 2]]


def test_a_rank_without_sequences_gets_padding() -> None:
    pairs = [([1, 2], [3, 4])]
    [batch] = pack_demonstrations(pairs, layout=layout(1, 2, multiple=4))
    assert batch.tokens.tolist() == [0] * 4
    assert batch.labels.tolist() == [-100] * 4
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert not batch.response_mask.any()


def test_updates_mix_the_samples_of_all_prompts() -> None:
    groups = [group(p, [p + 1], [[20]] * 8) for p in range(8)]
    first, second = (pack(groups, layout=layout(), prompts_per_update=2, seed=seed) for seed in (0, 1))
    assert all(len(set(update[0].tokens.tolist())) > 3 for update in first), (
        "siblings are spread over updates"
    )
    assert not same(first[0][0], second[0][0]), "the draw depends on the seed"


def test_advantages_may_come_later() -> None:
    groups = [group(p, [p + 1], [[20] * (p + 1), [21]]) for p in range(4)]
    advantages = torch.arange(8.0).reshape(4, 2) + 1
    at = layout(1, 2, 4, 4)
    empty = pack(groups, layout=at, prompts_per_update=2, seed=0)
    old = torch.ones(len(empty[0][0].tokens))
    empty[0][0] = dataclasses.replace(empty[0][0], old_logprobs=old)
    assert all(not batch.advantages.any() for update in empty for batch in update)
    filled = with_sample_values(empty, advantages=advantages)
    assert filled[0][0].old_logprobs is old
    for batch in (batch for update in filled for batch in update):
        expected = (batch.sequence_ids + 1.0) * batch.response_mask
        assert batch.advantages.tolist() == expected.tolist()


def test_demonstrations_have_advantage_one() -> None:
    [batch] = pack_demonstrations([([1, 2], [3, 4])], layout=layout())
    assert batch.labels.tolist() == [2, 3, 4]
    assert batch.advantages.tolist() == [0, 1, 1]
    assert batch.rollout_logprobs.tolist() == [0, 0, 0]


def test_a_sequence_that_fits_no_micro_batch_is_an_error() -> None:
    pack_demonstrations([([1, 2], [3] * 7)], layout=layout(tokens=8))
    with pytest.raises(ValueError, match=r"policy.micro_batch_tokens=8 must hold.* 9 positions"):
        pack_demonstrations([([1, 2], [3] * 8)], layout=layout(tokens=8))


def test_prompts_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"algorithm.prompts_per_update=2 must divide the 3 prompts"):
        pack([group(0, [1], [[2]])] * 3, layout=layout(), prompts_per_update=2, seed=0)


@pytest.mark.parametrize("pair", [([], [3]), ([1], [])])
def test_an_empty_half_is_an_error(pair: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="each needs at least 1"):
        pack_demonstrations([([1], [2]), pair], layout=layout())
