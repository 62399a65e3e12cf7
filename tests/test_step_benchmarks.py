"""benchmarks/train_step.py and benchmarks/refit.py on a tiny model: what they time is what they say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import refit
import torch
import train_step
from policy_bench import Subject, in_turns, on_ranks, spread, subject
from ranks import run_on_ranks
from train_step import BARE, CONTROL, GRPO, Batch

from megatron_fec.policy.step import Policy, cores
from megatron_fec.policy.weights import hf_weights

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
BATCH = Batch(prompts=2, group_size=2, prompt_tokens=4, response_tokens=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    chosen = subject(None, [], tmp_path_factory.mktemp("model"), sizes=TINY)
    return replace(chosen, settings=replace(chosen.settings, tensor_parallel=2, micro_batch_tokens=24))


def test_the_three_updates_are_of_one_gradient(tiny: Subject) -> None:
    """On policy no ratio reaches a clip bound, so what is compared differs in cost only."""

    def job(policy: Policy) -> tuple[dict[str, float], bool, dict[str, list[float]]]:
        micro_batches = train_step.update_batch(policy, BATCH, tiny.vocab_size, 24)
        assert sum(int(mb.response_mask.sum()) for mb in micro_batches) == 32
        works = train_step.updates(policy, micro_batches, BATCH)
        norms = {}
        for name, work in works.items():
            work()
            gradients = [p.main_grad for p in policy.chunks[0].parameters()]  # type: ignore[attr-defined]
            norms[name] = float(torch.stack([g.norm() for g in gradients]).norm())
        is_whole = cores(policy)[0]._softmax_settings()["second_moments"]  # type: ignore[operator]
        return norms, is_whole, in_turns(works, 2)

    for norms, is_whole, seconds in on_ranks(tiny, job) or []:
        assert norms[CONTROL] > 0 and is_whole
        assert norms[GRPO] == pytest.approx(norms[CONTROL], rel=1e-3)
        assert norms[BARE] == pytest.approx(norms[GRPO], rel=1e-3)
        assert {name: len(values) for name, values in seconds.items()} == {CONTROL: 2, GRPO: 2, BARE: 2}


def test_log_probs_only_makes_no_second_moments(tiny: Subject) -> None:
    def job(policy: Policy) -> list[bool]:
        seen: list[bool] = []
        micro_batches = train_step.update_batch(policy, BATCH, tiny.vocab_size, 24)

        def noted(stats: Any, micro_batch: Any) -> Any:
            seen.append(stats.sum_p2 is not None)
            return train_step.bare_grpo(stats, micro_batch)

        bare: Any = train_step.updates(policy, micro_batches, BATCH)[BARE]
        bare.func(noted)
        train_step.train_update(policy, micro_batches, noted)
        return seen

    (first, *_) = on_ranks(tiny, job) or []
    half = len(first) // 2
    assert first == [False] * half + [True] * half and half > 0


def test_the_report_of_an_update(tiny: Subject) -> None:
    ranks = [{CONTROL: [1.01, 2.02], GRPO: [1.0, 2.0], BARE: [0.5, 1.0]}] * 2
    assert train_step.over_ranks(ranks, is_cpu=False) == ranks[0]
    seconds = train_step.over_ranks(ranks, is_cpu=True)
    assert seconds[GRPO] == [2.0, 4.0]
    text = train_step.report(tiny, BATCH, seconds, ranks=2)
    assert "entropy control against grpo: +1.00% (median" in text
    assert "entropy control against log-probs only: +102.00%" in text
    assert "| grpo | 3.0000 (2.5000 to 3.5000) | 16 | - |" in text


def test_flops_are_six_times_the_weights_that_multiply(tiny: Subject) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model_dir)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    attention = 6 * 2 * 64 * 100  # layers, width of all heads, length
    assert train_step.flops_per_token(tiny.model_dir, 100) == 6 * matrices + attention


def test_a_refit_is_timed_with_all_its_bytes(tiny: Subject) -> None:
    def job(policy: Policy) -> tuple[int, dict[str, list[float]], bool]:
        own: dict[str, torch.Tensor] = {}
        refit.load(policy, own)
        same = all(torch.equal(own[name], tensor) for name, tensor in hf_weights(policy))
        return *refit.measured(policy, tiny, repeats=2, with_vllm=False), same

    found = on_ranks(tiny, job) or []
    on_disk = sum(path.stat().st_size for path in Path(tiny.model_dir).glob("*.safetensors"))
    for num_bytes, seconds, same in found:
        assert same and 0.95 * on_disk < num_bytes < on_disk  # the file has a header
        assert set(seconds) == {"stream", "load", "gather, by tensor", "gather, in buckets"}
    text = refit.report(tiny, found[0][0], [seconds for _, seconds, _ in found])
    assert text.count("\n| ") == 5 and "TP 2, 2 ranks on CPU, 2 repeats" in text


def test_turns_begin_with_another_each_time() -> None:
    order: list[str] = []

    def job(rank: int) -> tuple[list[str], dict[str, list[float]]]:
        works = {name: partial(order.append, name) for name in "abc"}
        return order, in_turns(works, 2)

    ((order, seconds),) = run_on_ranks(1, job)
    assert "".join(order) == "abcbcacab"
    assert all(len(values) == 2 for values in seconds.values())
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0) and spread([7.0]) == (7.0, 7.0, 7.0)
