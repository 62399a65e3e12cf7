"""The sampler on the training model against transformers, in every layout, and the engine on top of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native_fixtures import (
    LAYOUTS,
    LENGTH,
    PROMPTS,
    STOP,
    TEMPERATURE,
    VOCABULARY,
    WORDS,
    Response,
    assert_same,
    by_transformers,
    on_layout,
    sample,
    uniforms,
)
from ranks import run_on_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from megatron_fec.metrics import MetricSums
from megatron_fec.policy import sampling
from megatron_fec.policy.sampling import sample_responses
from megatron_fec.policy.step import Policy, compute_logprobs, train_update, unwrapped
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.rollout.engine import Sampling, check_groups
from megatron_fec.rollout.native_engine import NativeEngine
from megatron_fec.rollout.packing import PackLayout, pack_demonstrations
from megatron_fec.types import LossOutput, MicroBatch, Prompt, SampleGroup, TokenStats


@pytest.fixture(scope="module", params=["qwen2", "tied", "qwen3"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder, WORDS, seed=5, is_tied=request.param == "tied")
    if request.param == "qwen3":  # grouped key-value heads, norms on queries and keys, no biases
        config = Qwen3Config.from_pretrained(folder, num_attention_heads=4, head_dim=16)
        config.vocab_size += 16  # rows without a token
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, WORDS, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (len(tokenizer), tokenizer.eos_token_id) == (VOCABULARY, STOP)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_transformers(any_model: Path, layout: tuple[int, int, bool]) -> None:
    expected = by_transformers(any_model)
    lengths = [len(ids) for ids, _ in expected]
    assert min(lengths) < LENGTH == max(lengths), "the fixture must hold stopped and truncated responses"
    results = on_layout(any_model, sample, layout)
    assert_same(results[0], expected)
    assert all(result == results[0] for result in results), "every rank holds the same floats"


def test_a_response_ends_with_its_first_stop_token(model_dir: Path) -> None:
    many = PROMPTS * 5
    (responses,) = on_layout(model_dir, partial(sample, prompts=many))
    stopped, truncated = ([ids for ids, _ in responses if (ids[-1] == STOP) == end] for end in (True, False))
    assert len(stopped) > 3 and len(truncated) > 3
    assert all(ids.index(STOP) == len(ids) - 1 for ids in stopped)
    assert all(len(ids) == LENGTH and STOP not in ids for ids in truncated)
    assert all(len(ids) == len(logprobs) for ids, logprobs in responses)


@pytest.mark.parametrize("chunk_tokens", [1, 3 * 14])
def test_rows_do_not_depend_on_what_is_sampled_beside_them(model_dir: Path, chunk_tokens: int) -> None:
    def job(policy: Policy) -> tuple[list[list[int]], list[Response]]:
        sampling.CHUNK_TOKENS = chunk_tokens  # in a process of its own
        lengths = [len(prompt) for prompt in PROMPTS]
        return list(sampling._chunks(lengths, LENGTH)), sample(policy)

    ((chunks, responses),) = on_layout(model_dir, job)
    assert sorted(row for rows in chunks for row in rows) == list(range(len(PROMPTS)))
    assert max(len(rows) for rows in chunks) == (1 if chunk_tokens == 1 else 3)
    (together,) = on_layout(model_dir, sample)
    assert_same(responses, together)


def test_first_tokens_follow_the_softmax(model_dir: Path) -> None:
    count = 2000
    job = partial(sample, prompts=[PROMPTS[0]] * count, numbers=uniforms(count, 1))
    (responses,) = on_layout(model_dir, job)
    drawn = torch.tensor([ids[0] for ids, _ in responses])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model_dir)(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = torch.softmax(logits / TEMPERATURE, dim=0)
    frequencies = torch.bincount(drawn, minlength=VOCABULARY) / count
    deviations = (frequencies - expected) / (expected * (1 - expected) / count).sqrt()
    assert deviations.abs().max() < 4


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, 5)
    numbers = torch.tensor([[0.0], [0.4999], [0.5], [1 - 2**-53]], dtype=torch.float64)
    chosen, logprobs = sampling._draw(logits, numbers, 1.0)
    assert chosen.tolist() == [1, 1, 3, 3]
    assert logprobs.tolist() == pytest.approx([-0.6931471805599453] * 4, abs=1e-15)


def test_logits_of_nan_reach_the_guard_of_the_engine() -> None:
    chosen, logprobs = sampling._draw(torch.full((1, 3), torch.nan), torch.tensor([[0.3]]).double(), 1.0)
    assert chosen.tolist() == [2] and logprobs.isnan().all()


def test_an_empty_prompt_is_refused() -> None:
    unused: Any = None
    with pytest.raises(ValueError, match=r"prompt 1 has no token.*Filter"):
        sample(unused, [[1], []])


def test_no_step_and_no_logits_without_need(model_dir: Path) -> None:
    stopping = [row for row, (ids, _) in enumerate(by_transformers(model_dir)) if len(ids) < LENGTH]
    prompts = [PROMPTS[row] for row in stopping]

    def job(policy: Policy) -> tuple[list[Response], list[int]]:
        model: Any = unwrapped(policy.chunks[0])
        positions: list[int] = []  # of the hidden states that become logits, step after step
        model.output_layer.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].shape[0]))
        return sample(policy, prompts, numbers=uniforms(len(PROMPTS))[stopping]), positions

    ((responses, positions),) = on_layout(model_dir, job)
    ends = [len(prompt) + len(ids) for prompt, (ids, _) in zip(prompts, responses, strict=True)]
    assert positions == [1] * (max(ends) - min(len(prompt) for prompt in prompts))


def micro_batches(responses: Sequence[Response]) -> list[MicroBatch]:
    layout = PackLayout(data_parallel_rank=0, data_parallel_size=1, micro_batch_tokens=64, multiple=2)
    return pack_demonstrations(
        [(prompt, ids) for prompt, (ids, _) in zip(PROMPTS, responses, strict=True)], layout=layout
    )


def log_likelihood(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
    count = micro_batch.response_mask.sum()
    loss = -stats.logprobs[micro_batch.response_mask].sum()
    return LossOutput(loss_sum=loss, count=count, metrics=MetricSums.of({"logprob": (-loss, count)}))


@pytest.mark.parametrize(
    ("precision", "limit"),
    [("fp32", 1e-5), ("bf16", 0.05)],  # bf16 keeps 8 bits of an activation, and the two paths round apart
)
@pytest.mark.parametrize("layout", [(1, 1, False), (2, 2, True)])
def test_the_trainer_computes_the_same_logprobs(
    model_dir: Path, layout: tuple[int, int, bool], precision: str, limit: float
) -> None:
    def job(policy: Policy) -> tuple[float, float]:
        responses = sample(policy)
        _, sums = compute_logprobs(policy, [micro_batches(responses)])
        total = sum(sum(logprobs) for _, logprobs in responses)
        count = sum(len(ids) for ids, _ in responses)
        return total / count, sums.means()["logprob"]

    for sampled, trained in on_layout(model_dir, job, layout, precision=precision):
        assert sampled == pytest.approx(trained, abs=limit)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("layout", [(1, 1, False), (2, 1, True), (1, 2, False)])
def test_training_does_not_notice_the_sampling(
    model_dir: Path, layout: tuple[int, int, bool], is_training: bool
) -> None:
    batch = micro_batches([([1, 2, 3, STOP], [])] * len(PROMPTS))

    def state(policy: Policy) -> list[Any]:
        model = unwrapped(policy.chunks[0])
        gradients = [p.main_grad.clone() for p in policy.chunks[0].parameters()]  # type: ignore[attr-defined]
        parameters = [p.detach().clone() for p in policy.chunks[0].parameters()]
        flags = [
            (name, module.training, getattr(module, switch, None))
            for name, module in policy.chunks[0].named_modules()
            for switch in sampling.SPLIT_SWITCHES
        ]
        config = vars(model.config).copy()  # type: ignore[union-attr]
        return [*parameters, *gradients, torch.get_rng_state(), flags, str(config)]

    def job(policy: Policy, *, samples: bool) -> list[Any]:
        train_update(policy, batch, log_likelihood)
        policy.train(is_training)
        if samples:
            before = state(policy)
            sample(policy)
            assert all(
                torch.equal(a, b) if isinstance(a, Tensor) else a == b
                for a, b in zip(before, state(policy), strict=True)
            )
        train_update(policy, batch, log_likelihood)
        return state(policy)[:-2]

    with_samples = on_layout(model_dir, partial(job, samples=True), layout)
    without = on_layout(model_dir, partial(job, samples=False), layout)
    for one, other in zip(with_samples, without, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# The engine.

SETTINGS = Sampling(group_size=3, max_response_tokens=LENGTH, temperature=TEMPERATURE, seed=17)


def engine_prompts(count: int) -> list[Prompt]:
    """The first two are one prompt twice."""
    numbers = [0, *range(count - 1)]
    return [
        Prompt(
            prompt_id=n,
            text="",
            token_ids=tuple(PROMPTS[n % len(PROMPTS)]),
            answer=f"answer {n}",
            verifier="",
        )
        for n in numbers
    ]


def untouchable() -> Iterator[tuple[str, Tensor]]:
    raise AssertionError("the native engine has its weights already")
    yield


def generate(policy: Policy, tokenizer: Any, prompts: Sequence[Prompt]) -> list[SampleGroup]:
    engine = NativeEngine(
        sample=partial(sample_responses, policy),
        tokenizer=tokenizer,
        data_parallel_rank=policy.layout.data_parallel_rank,
        data_parallel_size=policy.layout.data_parallel,
        is_leader=policy.layout.reports_metrics,
    )
    engine.refit(untouchable(), version=4)
    groups = engine.generate(prompts, SETTINGS)
    engine.free(keep_weights=True)
    assert engine.asleep_bytes() == 0
    return groups


def ids_of(groups: Sequence[SampleGroup]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in group.samples] for group in groups]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    ("layout", "data_parallel"), [((1, 1, False), 2), ((2, 1, True), 2), ((1, 2, False), 1)]
)
def test_the_engine_gives_the_same_groups_in_every_layout(
    model_dir: Path, layout: tuple[int, int, bool], data_parallel: int, count: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts = engine_prompts(count)
    job = partial(generate, tokenizer=tokenizer, prompts=prompts)
    (expected,) = on_layout(model_dir, job)
    results = on_layout(model_dir, job, layout, data_parallel=data_parallel)
    assert all(result == results[0] for result in results), "every rank holds the whole list"
    assert [group.prompt for group in results[0]] == prompts
    assert ids_of(results[0]) == ids_of(expected)


def test_the_engine_fills_its_samples(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    (groups,) = on_layout(
        model_dir, partial(generate, tokenizer=tokenizer, prompts=engine_prompts(len(PROMPTS)))
    )
    check_groups(groups, weight_version=4, group_size=3)
    assert all(len(set(group)) == 3 for group in ids_of(groups)), "the samples of a group differ"
    assert ids_of(groups)[0] != ids_of(groups)[1], "a prompt that occurs twice is sampled anew"
    samples = [sample for group in groups for sample in group.samples]
    assert {sample.is_truncated for sample in samples} == {True, False}
    for found in samples:
        assert found.is_truncated == (found.token_ids[-1] != STOP)
        assert found.text == tokenizer.decode([i for i in found.token_ids if i != STOP])
        assert found.text or found.token_ids == (STOP,)


def fake_engine(
    eos_token_id: int | None = STOP, rank: int = 0, size: int = 1
) -> tuple[NativeEngine, list[Tensor]]:
    """An engine whose sampler notes its uniform numbers and stops at once."""
    seen: list[Tensor] = []

    def stop_at_once(prompts: Sequence[Sequence[int]], *, uniforms: Tensor, **rest: Any) -> Any:
        seen.append(uniforms)
        return [[rest["stop_id"]] for _ in prompts], [[-0.5] for _ in prompts]

    tokenizer = SimpleNamespace(eos_token_id=eos_token_id, decode=lambda ids, skip_special_tokens: "")
    place = {"data_parallel_rank": rank, "data_parallel_size": size, "is_leader": True}
    return NativeEngine(sample=stop_at_once, tokenizer=tokenizer, **place), seen


def test_data_parallel_ranks_share_the_work() -> None:
    def on_rank(rank: int) -> list[int]:
        engine, seen = fake_engine(rank=rank, size=2)
        engine.refit(untouchable(), version=1)
        assert len(engine.generate(engine_prompts(5), SETTINGS)) == 5
        return [len(rows) for rows in seen]

    assert run_on_ranks(2, on_rank) == [[9], [6]]


def test_random_numbers_belong_to_step_prompt_and_sample() -> None:
    engine, seen = fake_engine()
    engine.refit(untouchable(), version=1)
    state = torch.get_rng_state()
    engine.generate(engine_prompts(3), SETTINGS)
    engine.generate(engine_prompts(3)[1:], SETTINGS)
    assert torch.equal(state, torch.get_rng_state())
    both, later = seen
    assert both.shape == (9, LENGTH) and len(both.unique()) == 9 * LENGTH
    # Without its twin, the second prompt is the first occurrence; the third is itself.
    assert torch.equal(later, torch.cat([both[:3], both[6:]]))


def test_no_samples_before_the_first_refit() -> None:
    engine, _ = fake_engine()
    with pytest.raises(RuntimeError, match=r"before refit.*Call refit first"):
        engine.generate(engine_prompts(1), SETTINGS)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no eos_token"):
        fake_engine(eos_token_id=None)
