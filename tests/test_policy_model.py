"""The Megatron model of a Hugging Face checkpoint against transformers, and the weights on their way in and out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_fixtures import (
    ROPES,
    ROWS_WITHOUT_TOKEN,
    VOCABULARY,
    assert_same_weights,
    copied_weights,
    fp32,
    hf_tokens,
    make_groups,
    nll_step,
    on_layout,
    pack_for,
    save_model,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fec.config import PolicyConfig
from megatron_fec.policy.model import build_bridge, load_hf_config
from megatron_fec.policy.step import Policy, compute_logprobs, unwrapped
from megatron_fec.policy.weights import export_hf
from megatron_fec.types import MicroBatch

KINDS = ["qwen2", "tied", "qwen3", *ROPES]
# Between two fp32 forwards whose operations differ in order; transformers' own distance to float64 is half of it.
FP32_PAIR = 4e-6
GRID = [(1, 1), (2, 1), (1, 2), (2, 2)]  # tensor, pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def response_tokens(policy: Policy, groups: list) -> dict[tuple[int, int], float]:
    """Log-prob of each response token by (sample, position)."""
    filled, _ = compute_logprobs(policy, pack_for(policy, groups, micro_batch_tokens=48))
    found = {}
    for micro_batch in filled[0]:
        assert micro_batch.old_logprobs is not None
        mask = micro_batch.response_mask
        columns = (micro_batch.sequence_ids, micro_batch.position_ids, micro_batch.old_logprobs)
        for sample, position, logprob in zip(*(c[mask].tolist() for c in columns), strict=True):
            found[sample, position] = logprob
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_entropy_are_those_of_transformers(models: dict[str, Path], kind: str) -> None:
    groups = make_groups()

    def job(policy: Policy) -> Any:
        _, sums = compute_logprobs(policy, pack_for(policy, groups))
        return response_tokens(policy, groups), sums.means()

    ((logprobs, means),) = on_layout(models[kind], job)
    wanted = hf_tokens(models[kind], groups, torch.float32)
    assert logprobs.keys() == wanted.keys()
    assert logprobs == pytest.approx(
        {key: value[0] for key, value in wanted.items()}, rel=1e-6, abs=FP32_PAIR
    )
    assert means["entropy"] == pytest.approx(sum(h for _, h in wanted.values()) / len(wanted), rel=5e-7)
    assert means["logprob"] == pytest.approx(sum(p for p, _ in wanted.values()) / len(wanted), rel=5e-7)


def test_temperature_divides_the_logits(models: dict[str, Path]) -> None:
    groups = make_groups()
    (logprobs,) = on_layout(
        models["qwen3"], lambda policy: response_tokens(policy, groups), fp32(), temperature=0.7
    )
    wanted = hf_tokens(models["qwen3"], groups, torch.float32, temperature=0.7)
    assert logprobs == pytest.approx(
        {key: value[0] for key, value in wanted.items()}, rel=1e-6, abs=1.5 * FP32_PAIR
    )


def test_rows_without_a_token_have_no_probability(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight.shape[0] == VOCABULARY + ROWS_WITHOUT_TOKEN
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 50.0  # would take all the probability
    model.save_pretrained(folder)
    groups = make_groups()

    def job(policy: Policy) -> dict[str, float]:
        return compute_logprobs(policy, pack_for(policy, groups))[1].means()

    ((means),) = on_layout(folder, job)
    wanted = hf_tokens(folder, groups, torch.float32)  # over the true vocabulary
    assert means["entropy"] == pytest.approx(sum(h for _, h in wanted.values()) / len(wanted), rel=5e-7)
    assert 0 < means["entropy"] <= math.log(VOCABULARY)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama3"])
def test_bf16_trains_one_step(models: dict[str, Path], kind: str) -> None:
    groups = make_groups()

    def job(policy: Policy) -> Any:
        before = copied_weights(policy)
        (micro_batches,) = pack_for(policy, groups)
        stats = response_tokens(policy, groups)
        return stats, nll_step(policy, micro_batches), before, copied_weights(policy)

    settings = PolicyConfig(precision="bf16", distributed_optimizer=True)
    ((logprobs, (loss, grad_norm), before, after),) = on_layout(models[kind], job, settings)
    assert math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm > 0
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    wanted = hf_tokens(models[kind], groups, torch.float32)
    errors = [abs(logprobs[key] - wanted[key][0]) for key in wanted]
    assert sum(errors) / len(errors) < 0.05  # 8 bits of mantissa through two layers


@pytest.mark.parametrize(("tensor", "pipeline"), GRID)
@pytest.mark.parametrize("kind", ["qwen2", "tied", "qwen3", "llama_tied"])
def test_exported_weights_are_the_loaded_ones(
    models: dict[str, Path], kind: str, tensor: int, pipeline: int
) -> None:
    settings = fp32(tensor_parallel=tensor, pipeline_parallel=pipeline)
    wanted = load_file(models[kind] / "model.safetensors")
    for weights in on_layout(models[kind], copied_weights, settings):  # the same on every rank
        assert_same_weights(weights, wanted)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["qwen2", "tied"])
def test_an_exported_folder_is_the_checkpoint(
    models: dict[str, Path], tmp_path: Path, kind: str, tensor: int, pipeline: int
) -> None:
    target = tmp_path / "hf"
    (target / "old").mkdir(parents=True)  # one that is there is replaced
    left_over = tmp_path / ".writing_hf"
    left_over.mkdir()
    (left_over / "half.safetensors").write_bytes(b"half")
    settings = fp32(tensor_parallel=tensor, pipeline_parallel=pipeline)
    on_layout(models[kind], lambda policy: export_hf(policy, models[kind], target), settings)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert not (target / "old").exists() and not (target / "half.safetensors").exists()
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (target, models[kind])
    )
    assert_same_weights(ours, theirs)
    text = "1 + 2"
    expected = AutoTokenizer.from_pretrained(models[kind])(text).input_ids
    assert AutoTokenizer.from_pretrained(target)(text).input_ids == expected
    groups = make_groups()
    assert hf_tokens(target, groups, torch.float32) == hf_tokens(models[kind], groups, torch.float32)


@pytest.mark.parametrize("kind", ["qwen2", "llama_tied"])
def test_a_checkpoint_in_several_files_is_read_and_written(tmp_path: Path, kind: str) -> None:
    source, target = save_model(tmp_path / "source", kind), tmp_path / "target"
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    on_layout(source, lambda policy: export_hf(policy, source, target), fp32(pipeline_parallel=2))
    assert_same_weights(AutoModelForCausalLM.from_pretrained(target).state_dict(), model.state_dict())


def test_each_rank_holds_its_share_only(models: dict[str, Path]) -> None:
    def job(policy: Policy) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in unwrapped(policy.chunks[0]).named_parameters()}

    first, _, last, _ = on_layout(models["qwen2"], job, fp32(tensor_parallel=2, pipeline_parallel=2))
    assert first["embedding.word_embeddings.weight"] == (64, 64)  # 37 rows padded to 2 x 64
    assert last["output_layer.weight"] == (64, 64)
    assert not first.keys() & {"output_layer.weight", "decoder.final_layernorm.weight"}
    assert {name.split(".")[2] for name in first if name.startswith("decoder.layers")} == {"0"}


def test_padding_of_a_micro_batch_changes_nothing(models: dict[str, Path]) -> None:
    groups = make_groups()

    def job(policy: Policy) -> list[Tensor]:
        found = []
        for multiple in (1, 64):
            updates = pack_for(policy, groups, multiple=multiple)
            ((micro_batch,),) = compute_logprobs(policy, updates)[0]
            found.append(response_logprobs(micro_batch))
        return found

    ((plain, padded),) = on_layout(models["qwen2"], job)
    torch.testing.assert_close(padded, plain, rtol=0, atol=FP32_PAIR)  # matrices of another height


def response_logprobs(micro_batch: MicroBatch) -> Tensor:
    assert micro_batch.old_logprobs is not None
    return micro_batch.old_logprobs[micro_batch.response_mask]


def test_the_mapping_of_a_tied_model_stays_its_own(models: dict[str, Path]) -> None:
    def name_of_the_output(policy: Policy, kind: str) -> str:
        bridge = build_bridge(load_hf_config(str(models[kind])), fp32())
        return bridge._DIRECT_MAPPING["output_layer.weight"]

    def job(policy: Policy) -> list[str]:
        return [name_of_the_output(policy, kind) for kind in ("tied", "qwen2", "llama_tied", "llama")]

    (names,) = on_layout(models["qwen2"], job)
    assert names == ["model.embed_tokens.weight", "lm_head.weight"] * 2
