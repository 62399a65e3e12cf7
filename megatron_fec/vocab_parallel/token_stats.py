"""Log-probability and entropy of each token from vocabulary shards: one pass over the logits, one collective.

The vocabulary is cut into blocks, a whole number of them on each rank. A block of a row is reduced to a few sums, with
its maximum m of z and u = (z - m) / temperature:

    s0 = sum e^u    s1 = sum u e^u    t = z of the label, if it is here    [s2 = sum e^2u    s3 = sum u e^2u]

These floats are gathered, moved to the common maximum and added in the order of the vocabulary. So the same logits give
the same bits at all tensor-parallel sizes that divide BLOCKS, if their padded width is the same and a multiple of
BLOCKS * ALIGNMENT. With ln s0 and c = s1 / s0 of the whole row:

    ln p_j = u_j - ln s0    H = ln s0 - c   Q = sum p^2 = s2 / s0^2   B = sum p^2 (ln p + H) = s3 / s0^2 - c Q
    d ln p_a / dz_j = (1[j=a] - p_j) / temperature    dH / dz_j = -p_j (u_j - c) / temperature
    <d ln p_a / dz, dH / dz> temperature^2 = B - p_a (ln p_a + H)
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fec.types import IGNORED, TokenStats
from megatron_fec.vocab_parallel import torch_kernel
from megatron_fec.vocab_parallel.merge import merge_sums
from megatron_fec.vocab_parallel.shard import VocabLayout, require, vocab_layout

LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    second_moments: bool = False,
    reuse_logits: bool = False,
) -> TokenStats:
    """Statistics of softmax(logits / temperature), the same bits on every rank of `group`.

    logits: [T, V_local] bf16, fp16, fp32 or fp64; rank r owns columns [r * V_local, (r + 1) * V_local), with
        one V_local on all ranks. Columns at -inf have probability 0 and gradient 0, under a label too.
    labels: [T] int64 global ids, the same on every rank. -100 is ignored: log-probability and alignment 0,
        entropy as usual, and a zero gradient row for both.
    group: the tensor-parallel group; None means that V_local is the whole vocabulary.
    vocab_size: the true vocabulary, default V_local * ranks; columns after it are padding and take no part.
    chunk_tokens: rows worked on at a time outside Triton, default as many as fit the cache. Results do not
        depend on it, but for the last bit of a chunk of one row: torch splits its sums over CPU threads.
    second_moments: also return sum_p2, baseline and alignment, which carry no gradient.
    reuse_logits: backward writes the gradient over the logits; it runs once, and nothing else may need them: an
        operation that does raises in its own backward. The .grad of a leaf is then the leaf's memory.

    Returns [T] fp32 (fp64 for fp64 logits), the dtype of all arithmetic; logprobs and entropy can be
    differentiated once. Forward: one all-gather of 4 floats a token and block (6 with second_moments), also
    if T is 0. Backward: no communication. Nothing but [T] tensors and the logits themselves is kept for it.

    Raises ValueError on all ranks together and leaves none waiting: what the ranks share by contract (shapes,
    settings) is checked before the collective; widths, vocabulary sizes and labels travel with it, and every
    rank judges those of all. Reading them synchronizes a GPU.
    """
    _check_inputs(logits, labels, temperature, chunk_tokens)
    layout = vocab_layout(logits.shape[1], group=group, vocab_size=vocab_size)
    options = {"temperature": temperature, "chunk_tokens": chunk_tokens}
    logprobs, entropy, *second = _TokenStats.apply(
        logits, labels, layout, options, second_moments, reuse_logits
    )
    return as_token_stats(logprobs, entropy, second)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        layout: VocabLayout,
        options: dict[str, Any],
        second_moments: bool,
        reuse_logits: bool,
    ) -> tuple[Tensor, ...]:
        kernel = kernel_for(logits)
        sums = kernel.shard_sums(logits, labels, shard=layout.shard, second_moments=second_moments, **options)
        row = merge_sums(sums, labels, layout=layout, temperature=options["temperature"])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*row.second)
        # save_for_backward also makes autograd refuse logits that were changed between forward and backward.
        ctx.save_for_backward(logits, labels, row.maxima, row.log_s0, row.centre, row.logprobs)
        ctx.settings = layout.shard, options, reuse_logits
        ctx.is_spent = False
        return row.logprobs, row.entropy, *row.second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        shard, options, reuse_logits = ctx.settings
        if ctx.is_spent:
            raise RuntimeError(
                "token_stats: reuse_logits=True allows one backward, the logits now hold its gradient. "
                "Set reuse_logits=False to run backward again."
            )
        logits, labels, maxima, log_s0, centre, logprobs = ctx.saved_tensors
        ctx.is_spent = reuse_logits
        out = logits.detach() if reuse_logits else torch.empty_like(logits)
        kernel_for(logits).write_gradient(
            out,
            logits,
            labels,
            row=(maxima, log_s0, centre),
            grads=row_gradients(grads[0], grads[1], labels, logprobs, options["temperature"]),
            shard=shard,
            **options,
        )
        if reuse_logits:
            # Autograd does not see what a Triton kernel writes, and must refuse these logits to others from now on.
            torch.autograd.graph.increment_version(out)
        return out, None, None, None, None, None


def kernel_for(logits: Tensor) -> ModuleType:
    """The module whose shard_sums and write_gradient run on these logits: Triton on CUDA, torch elsewhere and for fp64."""
    if not logits.is_cuda or logits.dtype == torch.float64:
        return torch_kernel
    from megatron_fec.vocab_parallel import triton_kernel  # triton comes with torch's CUDA builds only

    return triton_kernel


def row_gradients(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    labels: Tensor,
    logprobs: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Upstream gradients as the kernels take them: of logprobs, the same at the label, of entropy; [T], over temperature.

    Ignored rows get 0; a label at -inf has no gradient of its own.
    """
    ignored = labels == IGNORED
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(logprobs)
    pull = grad_logprobs.masked_fill(ignored, 0.0).div_(temperature)
    spread = None if grad_entropy is None else grad_entropy.masked_fill(ignored, 0.0).div_(temperature)
    return pull, pull.masked_fill(logprobs == -math.inf, 0.0), spread


def as_token_stats(logprobs: Tensor, entropy: Tensor, second: list[Tensor]) -> TokenStats:
    sum_p2, baseline, alignment = second or (None, None, None)
    return TokenStats(
        logprobs=logprobs, entropy=entropy, sum_p2=sum_p2, baseline=baseline, alignment=alignment
    )


def _check_inputs(logits: Tensor, labels: Tensor, temperature: float, chunk_tokens: int | None) -> None:
    rule = "must be bf16, fp16, fp32 or fp64. Pass logits, not ids."
    require(logits.dtype in LOGIT_DTYPES, f"logits.dtype={logits.dtype} {rule}")
    rule = "must be [T, V_local] with V_local at least 1. Use logits.flatten(0, -2)."
    require(logits.dim() == 2 and logits.shape[1] > 0, f"logits.shape={tuple(logits.shape)} {rule}")
    check_settings(labels, logits.shape[0], temperature, chunk_tokens)


def check_settings(labels: Tensor, tokens: int, temperature: float, chunk_tokens: int | None) -> None:
    """What all ranks share: raises ValueError on all of them, before anything is sent."""
    rule = f"must be ({tokens},), one label for each row. Use labels.flatten()."
    require(labels.shape == (tokens,), f"labels.shape={tuple(labels.shape)} {rule}")
    rule = "must be torch.int64. Use labels.long()."
    require(labels.dtype == torch.int64, f"labels.dtype={labels.dtype} {rule}")
    rule = "must be finite and at least 1e-6. Use 1.0 for no scaling."
    require(1e-6 <= temperature < math.inf, f"temperature={temperature} {rule}")
    rule = "must be at least 1. Use None for the default."
    require(chunk_tokens is None or chunk_tokens >= 1, f"chunk_tokens={chunk_tokens} {rule}")
