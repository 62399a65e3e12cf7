"""A random Qwen2 checkpoint of 0.16 M parameters with a byte-level tokenizer, for the embedded task and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

END = "<|endoftext|>"
SPACE = "\u0120"  # how a byte-level vocabulary writes the space before a word


def build_tokenizer(words: Sequence[str]) -> Qwen2Tokenizer:
    """A byte-level BPE of Qwen2's own class in which " word" is one token, and so is each digit and sign.

    transformers rebuilds the tokenizer of a qwen2 checkpoint as this class, whatever was saved; so words become merges.
    """
    letters = sorted({letter for word in words for letter in word})
    spaced = [SPACE + word for word in words if word.isalpha()]
    prefixes = {token[:length]: None for token in spaced for length in range(2, len(token) + 1)}
    merges: Any = [(prefix[:-1], prefix[-1]) for prefix in prefixes]  # as tokenizers takes them
    vocabulary = {token: index for index, token in enumerate([*letters, SPACE, *prefixes, END])}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token=END, pad_token=END, unk_token=END, model_max_length=1024
    )


def save_tiny_model(directory: Path, words: Sequence[str], *, seed: int, is_tied: bool = False) -> None:
    """Writes the checkpoint and its tokenizer as Hugging Face files.

    Heads are 32 wide, the least that vLLM's CPU attention takes; two of them and two layers allow TP 2 and PP 2.
    """
    tokenizer: Any = build_tokenizer(words)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.08,
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
