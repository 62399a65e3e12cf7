"""A checkpoint that is small and large enough to be seen in a GPU's memory, and its policy; imported on the ranks only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from policy_fixtures import VOCABULARY, WORDS
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_fec.config import OptimizerConfig, PolicyConfig
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.step import Policy, build_policy
from megatron_fec.policy.tiny_model import save_tiny_model


def save_model(folder: Path) -> Path:
    """13 M parameters in bf16, with a tokenizer; heads are 64 wide."""
    save_tiny_model(folder, WORDS, seed=5)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=VOCABULARY - 1,
        dtype="bfloat16",
    )
    torch.manual_seed(5)
    model: Any = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def build(folder: str, **settings: Any) -> Policy:
    """bf16 and the distributed optimizer, unless told otherwise."""
    policy = PolicyConfig(**{"precision": "bf16", "micro_batch_tokens": 512, **settings})
    layout = initialize_parallel(policy, seed=3)
    sizes = {"temperature": 1.0, "total_steps": 9, "vocab_size": VOCABULARY}
    return build_policy(folder, policy, OptimizerConfig(lr=1e-3), layout=layout, **sizes)
