"""Token statistics straight from hidden states and the output weight, with the logits of a part of the vocabulary at a time.

The chunks run along the vocabulary and not along the tokens: each row of the weight's gradient is then one product over
all tokens, so that no second weight-sized buffer is summed into. Backward computes the logits again, a fourth matrix
product: a gradient made in the forward would need each token's loss before the others' statistics are known, which rules
out any loss over whole sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fec.types import TokenStats
from megatron_fec.vocab_parallel.merge import add_blocks, merge_sums
from megatron_fec.vocab_parallel.shard import Shard, VocabLayout, require, vocab_layout
from megatron_fec.vocab_parallel.token_stats import (
    LOGIT_DTYPES,
    as_token_stats,
    check_settings,
    kernel_for,
    row_gradients,
)


def chunked_head_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int,
    second_moments: bool = False,
) -> TokenStats:
    """token_stats(hidden @ weight.T, labels, ...), to rounding, without ever holding those logits.

    hidden: [T, H] bf16, fp16, fp32 or fp64, the same on every rank of `group`; its gradient is this rank's part, to be
        added up over the group by the caller.
    weight: [V_local, H], hidden's dtype.
    chunk_tokens: logits in memory at one time, in rows of V_local; T or more is all of them.

    Everything else is as in token_stats. Forward: one product and one all-gather. Backward: three products, no
    communication. Peak memory beyond inputs and gradients: chunk_tokens * V_local logits, and hidden's gradient in fp32.
    Raises ValueError as token_stats does.
    """
    rule = "must be bf16, fp16, fp32 or fp64. Pass the model's hidden states."
    require(hidden.dtype in LOGIT_DTYPES, f"hidden.dtype={hidden.dtype} {rule}")
    rule = f"must be hidden's, {hidden.dtype}. Cast the weight."
    require(weight.dtype == hidden.dtype, f"weight.dtype={weight.dtype} {rule}")
    rule = f"must be [T, H] and [V_local, H], not {tuple(hidden.shape)} and {tuple(weight.shape)}. Use flatten(0, -2)."
    is_matching = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    require(is_matching and weight.shape[0] > 0, f"hidden.shape and weight.shape {rule}")
    check_settings(labels, hidden.shape[0], temperature, chunk_tokens)
    blocks = max(1, -(-hidden.shape[0] // chunk_tokens))
    layout = vocab_layout(weight.shape[0], group=group, vocab_size=vocab_size, blocks=blocks)
    logprobs, entropy, *second = _ChunkedHead.apply(
        hidden, weight, labels, layout, temperature, second_moments
    )
    return as_token_stats(logprobs, entropy, second)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        layout: VocabLayout,
        temperature: float,
        second_moments: bool,
    ) -> tuple[Tensor, ...]:
        kernel = kernel_for(hidden)
        options = {"temperature": temperature, "second_moments": second_moments}
        sums = None  # of the columns so far: all blocks' own would be more than a chunk of logits
        for shard, _, logits in _chunks(hidden, weight, layout.shard):
            new = kernel.shard_sums(logits, labels, shard=shard, **options)[:, 0]
            sums = new if sums is None else add_blocks(torch.stack([sums, new]), temperature)
        assert sums is not None
        row = merge_sums(sums[:, None], labels, layout=layout, temperature=temperature)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*row.second)
        ctx.save_for_backward(hidden, weight, labels, row.maxima, row.log_s0, row.centre, row.logprobs)
        ctx.settings = layout.shard, temperature
        return row.logprobs, row.entropy, *row.second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, temperature = ctx.settings
        hidden, weight, labels, maxima, log_s0, centre, logprobs = ctx.saved_tensors
        kernel = kernel_for(hidden)
        row_grads = row_gradients(grads[0], grads[1], labels, logprobs, temperature)
        grad_hidden = torch.zeros_like(hidden, dtype=maxima.dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_weight = torch.empty_like(weight) if needs_weight else None
        for shard, columns, logits in _chunks(hidden, weight, whole):
            kernel.write_gradient(
                logits,
                logits,
                labels,
                row=(maxima, log_s0, centre),
                grads=row_grads,
                shard=shard,
                temperature=temperature,
            )
            if needs_hidden:
                grad_hidden += logits @ weight[columns]
            if grad_weight is not None:
                torch.mm(logits.t(), hidden, out=grad_weight[columns])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _chunks(hidden: Tensor, weight: Tensor, whole: Shard) -> Iterator[tuple[Shard, slice, Tensor]]:
    """Each block of the shard as a shard of its own, its rows of the weight, and its logits in one reused buffer."""
    tokens, step = hidden.shape[0], whole.block_width
    buffer = hidden.new_empty(tokens * step)
    for first in range(0, whole.width, step):
        width = min(step, whole.width - first)
        columns = slice(first, first + width)
        logits = buffer[: tokens * width].view(tokens, width)
        torch.mm(hidden, weight[columns].t(), out=logits)
        valid = min(max(whole.valid - first, 0), width)
        yield Shard(start=whole.start + first, width=width, valid=valid, blocks=1), columns, logits
