"""What policy.logits_chunk_tokens costs and saves: the LM head in chunks beside whole logits, on this CPU.

    python benchmarks/chunked_head.py

One process, one thread, forward and backward of hidden states and output weight; ratios of one run, taken in turns.
"""

from __future__ import annotations

import gc
import multiprocessing
import time

import torch
from measure import extra_bytes, return_freed_memory
from torch import Tensor

from megatron_fec.vocab_parallel.chunked_head import chunked_head_token_stats
from megatron_fec.vocab_parallel.token_stats import token_stats

TOKENS, HIDDEN, VOCABULARY = 512, 512, 152064
CHUNKS = (256, 64, 16)
REPEATS = 3


def head(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int | None) -> None:
    """Gradients of hidden [T, H] and weight [V, H], which are dropped; None is whole logits."""
    if chunk_tokens is None:
        stats = token_stats(hidden @ weight.t(), labels, reuse_logits=True)
    else:
        stats = chunked_head_token_stats(hidden, weight, labels, chunk_tokens=chunk_tokens)
    torch.autograd.grad(stats.logprobs.sum() + 0.1 * stats.entropy.sum(), (hidden, weight))


def compare(dtype: torch.dtype) -> dict[int | None, tuple[float, float]]:
    """(CPU seconds, peak bytes above inputs over the bytes of the logits) by chunk_tokens."""
    torch.set_num_threads(1)
    return_freed_memory()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    logits_bytes = TOKENS * VOCABULARY * dtype.itemsize
    choices = (None, *CHUNKS)
    for chunk in choices:  # the products' own buffers, once
        head(hidden, weight, labels, chunk)
    peaks = {c: extra_bytes(lambda c=c: head(hidden, weight, labels, c), "cpu") for c in choices}
    seconds = dict.fromkeys(choices, float("inf"))
    for _ in range(REPEATS):
        for chunk in choices:
            gc.collect()
            start = time.process_time()
            head(hidden, weight, labels, chunk)
            seconds[chunk] = min(seconds[chunk], time.process_time() - start)
    return {chunk: (seconds[chunk], peaks[chunk] / logits_bytes) for chunk in choices}


def main() -> None:
    print(f"T = {TOKENS}, H = {HIDDEN}, V = {VOCABULARY}, torch {torch.__version__}, one CPU thread.")
    print("The gradient of the weight, as large as H / T of the logits, is in every row.\n")
    print("| dtype | logits at a time | CPU seconds / whole | peak memory / logits |\n|---|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a peak of its own
            found = pool.apply(compare, (dtype,))
        whole = found[None][0]
        for chunk, (seconds, peak) in found.items():
            name = "all" if chunk is None else f"{chunk} tokens' worth"
            print(f"| {str(dtype)[6:]} | {name} | {seconds / whole:.2f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
