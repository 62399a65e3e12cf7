"""A random Qwen2 checkpoint of 0.1 M parameters with a word-level tokenizer, for the embedded task and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END, UNKNOWN = "<end>", "<unknown>"


def save_tiny_model(directory: Path, words: Sequence[str], *, seed: int, is_tied: bool = False) -> None:
    """Writes the checkpoint and its tokenizer as Hugging Face files.

    Heads are 32 wide, the least that vLLM's CPU attention takes; two of them and two layers allow TP 2 and PP 2.
    """
    vocabulary = {word: index for index, word in enumerate([*words, END, UNKNOWN])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, unk_token=UNKNOWN, model_max_length=1024
    )
    config = Qwen2Config(
        vocab_size=len(vocabulary),
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
