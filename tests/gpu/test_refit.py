"""The way of the weights on GPUs: the export, and vLLM's sleep at both levels between two refits.

python -m pytest tests/gpu/test_refit.py      # one test needs two GPUs, one vllm
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from gpu_ranks import on_gpus

HAS_VLLM = importlib.util.find_spec("vllm") is not None
KV_SHARE = 0.3  # of the GPU's memory, for vLLM


def make_model(rank: int, folder: str) -> None:
    from gpu_models import save_model

    save_model(Path(folder))


def export(rank: int, folder: str, tensor_parallel: int) -> dict[str, Any]:
    """How the streamed tensors compare with the files that the policy was loaded from."""
    import torch
    from gpu_models import build
    from safetensors.torch import load_file

    from megatron_fec.policy.device import device
    from megatron_fec.policy.weights import hf_weights

    policy = build(folder, tensor_parallel=tensor_parallel)
    files = {n: t for f in Path(folder).glob("*.safetensors") for n, t in load_file(f).items()}
    names, faults = [], []
    for name, tensor in hf_weights(policy):
        names.append(name)
        if tensor.device.type != device().type or not torch.equal(tensor.cpu(), files[name]):
            faults.append(name)
    return {"missing": sorted(files.keys() ^ set(names)), "faults": faults}


def sleep_levels(rank: int, folder: str) -> dict[str, Any]:
    """Free memory and samples before and after each kind of sleep."""
    import torch
    from gpu_models import build
    from transformers import AutoTokenizer

    from megatron_fec.policy.weights import hf_weights
    from megatron_fec.rollout.engine import Sampling, true_vocab_size
    from megatron_fec.rollout.vllm_engine import VllmEngine
    from megatron_fec.types import Prompt

    def free() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def sampled() -> list[Any]:
        groups = engine.generate(prompts, sampling)
        return [[list(sample.token_ids) for sample in group.samples] for group in groups]

    policy = build(folder)
    engine = VllmEngine(
        model_dir=folder,
        vocab_size=true_vocab_size(AutoTokenizer.from_pretrained(folder)),
        dtype="bfloat16",
        tensor_parallel=1,
        max_model_len=128,
        gpu_memory_utilization=KV_SHARE,
        seed_per_request=True,
    )
    prompts = [Prompt(prompt_id=i, text="", token_ids=(i + 1, 2), answer="", verifier="") for i in range(4)]
    sampling = Sampling(group_size=2, max_response_tokens=16, temperature=1.0, seed=1)
    seen: dict[str, Any] = {"asleep": engine.asleep_bytes(), "free": [free()]}
    engine.refit(hf_weights(policy), version=1)
    seen["free"].append(free())  # the KV cache still sleeps
    first = sampled()
    seen["free"].append(free())
    assert engine.asleep_bytes() == 0
    engine.free(keep_weights=True)
    seen["free"].append(free())
    seen["kept"] = sampled() == first
    engine.free(keep_weights=False)
    seen["free"].append(free())
    engine.refit(hf_weights(policy), version=2)
    seen["loaded_again"] = sampled() == first
    return seen


@pytest.mark.gpu
def test_the_export_is_what_was_loaded(tmp_path: Path) -> None:
    on_gpus(1, make_model, str(tmp_path))
    assert on_gpus(1, export, str(tmp_path), 1) == [{"missing": [], "faults": []}]


@pytest.mark.gpu(2)
def test_the_export_is_gathered_over_tensor_ranks(tmp_path: Path) -> None:
    on_gpus(1, make_model, str(tmp_path))
    assert on_gpus(2, export, str(tmp_path), 2) == [{"missing": [], "faults": []}] * 2


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
def test_vllm_sleeps_and_wakes(tmp_path: Path) -> None:
    on_gpus(1, make_model, str(tmp_path))
    (seen,) = on_gpus(1, sleep_levels, str(tmp_path))
    start, loaded, awake, level1, level2 = seen["free"]
    assert seen["asleep"] > 0 and seen["kept"] and seen["loaded_again"]
    assert awake < loaded < start  # weights first, then the KV cache
    given_back = 0.9 * seen["asleep"]
    assert level1 - awake > given_back and level2 - awake > given_back
