"""Started by test_vllm_experts.py under torchrun: a mixture of experts trained by Megatron and sampled by vLLM.

argv: model folder, output folder, where it writes the mismatch of both refits as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from policy_fixtures import fp32
from transformers import AutoTokenizer

from megatron_fec.config import OptimizerConfig
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.step import build_policy, compute_logprobs, cores
from megatron_fec.policy.weights import hf_weights
from megatron_fec.rollout.engine import Sampling, true_vocab_size
from megatron_fec.rollout.packing import PackLayout, pack
from megatron_fec.rollout.vllm_engine import VllmEngine
from megatron_fec.types import Prompt

TEMPERATURE = 0.7


def main(model_dir: str, out_dir: str) -> None:
    settings = fp32()
    layout = initialize_parallel(settings, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    vocab_size = true_vocab_size(tokenizer)
    policy = build_policy(
        model_dir,
        settings,
        OptimizerConfig(lr=1e-2),
        layout=layout,
        temperature=TEMPERATURE,
        total_steps=9,
        vocab_size=vocab_size,
    )
    engine = VllmEngine(
        model_dir=model_dir,
        vocab_size=vocab_size,
        dtype="float32",
        tensor_parallel=1,
        max_model_len=256,
        gpu_memory_utilization=0.3,
        seed_per_request=True,
    )
    prompts = [
        Prompt(prompt_id=i, text=text, token_ids=tuple(tokenizer(text)["input_ids"]), answer="", verifier="")
        for i, text in enumerate(["0+1=", "1+1="])
    ]
    mismatches = []
    for version in (1, 2):
        engine.refit(hf_weights(policy), version=version)
        groups = engine.generate(
            prompts, Sampling(group_size=3, max_response_tokens=60, temperature=TEMPERATURE, seed=11)
        )
        pack_layout = PackLayout(
            data_parallel_rank=layout.data_parallel_rank,
            data_parallel_size=layout.data_parallel,
            micro_batch_tokens=256,
            multiple=1,
        )
        updates = pack(groups, layout=pack_layout, prompts_per_update=len(prompts), seed=1)
        mismatches.append(compute_logprobs(policy, updates)[1].means()["mismatch"])
        with torch.no_grad():
            for parameter in cores(policy)[0].parameters():
                parameter.mul_(1.1)  # far enough that stale experts would show
    Path(out_dir, "mismatches.json").write_text(json.dumps(mismatches))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
