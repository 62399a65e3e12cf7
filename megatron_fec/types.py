"""The data that flows through one step: Prompt -> Sample -> SampleGroup -> MicroBatch -> TokenStats -> ClipBounds.

Letters: T tokens of a packed micro-batch that a rank holds, V vocabulary, V_local a shard of it, N sequences of a
micro-batch.
Alignment holds everywhere: index t of any [T] tensor is about predicting `labels[t]`, the token after `tokens[t]`.

The text half (Prompt, Sample, SampleGroup) is used by verifier processes, so this module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_fec.metrics import MetricSums

IGNORED = -100  # a label with nothing to predict, as in torch's cross entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task, tokenized; the same object on every rank."""

    prompt_id: int  # row of the data set, after filtering
    text: str  # what the engine sees, rendered
    token_ids: tuple[int, ...]
    answer: str  # what the verifier compares with
    verifier: str  # key of tasks.verifier.SCORERS
    extra: str = ""  # JSON for the verifier, "" when it needs none


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response of the policy."""

    token_ids: tuple[int, ...]  # the stop token included
    logprobs: tuple[float, ...]  # the engine's, one per token id
    text: str  # decoded, special tokens skipped
    is_truncated: bool  # finish reason "length"
    weight_version: int  # version of the weights that sampled it


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGroup:
    """The G responses of one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward sees: N sequences packed end to end into T tokens; identical on TP and PP ranks.

    The length is padded to a multiple of the layout; the padding is one more sequence, without labels.
    Under context parallelism every sequence is padded at its end, and the [T] tensors hold this context rank's part
    (context_split.py): T is the length over the context ranks. cu_seqlens and max_seqlen are those of the whole.
    """

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64, tokens shifted inside each sequence, -100 where there is nothing to predict
    position_ids: Tensor  # [T] int64, restarting at 0 in each sequence
    cu_seqlens: Tensor  # [N + 1] int32, starts of the sequences, then the whole length
    max_seqlen: int
    sequence_ids: Tensor  # [T] int64, number of the sample inside the whole step, -1 on padding
    response_mask: Tensor  # [T] bool, True where labels[t] was sampled by the policy
    response_starts: Tensor  # [T] bool, True at the first position of a response, on one context rank
    response_lengths: Tensor  # [T] int64, tokens of the whole response, 0 outside it
    advantages: Tensor  # [T] fp32, 0 outside the response
    rollout_logprobs: Tensor  # [T] fp32, the engine's, 0 outside the response
    # [T] fp32, by the trainer before the first update; last pipeline stage only
    old_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Statistics of each position's next-token distribution; the same on all TP ranks, last pipeline stage only."""

    logprobs: Tensor  # [T] log p(labels[t]), 0 where labels[t] is -100; differentiable
    entropy: Tensor  # [T] nats over the true vocabulary; differentiable
    sum_p2: Tensor | None = None  # [T] sum of p^2
    # [T] B = sum of p^2 (ln p + H): section 3 of the paper, with the term it drops
    baseline: Tensor | None = None
    # [T] <grad log p(labels[t]), grad H> over z / temperature; 0 where ignored
    alignment: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendWeights:
    """How much of the dynamic lines replaces eps_std; (0, 0) is GRPO."""

    upper: float
    lower: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipBounds:
    """The ratio of token t may move inside [1 - eps_lower[t], 1 + eps_upper[t]]; no gradient flows through either."""

    eps_lower: Tensor  # [T]
    eps_upper: Tensor  # [T]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """All that a policy loss may look at; [T] tensors of one micro-batch."""

    logprobs: Tensor  # fp32, differentiable
    old_logprobs: Tensor
    advantages: Tensor
    response_mask: Tensor  # bool
    bounds: ClipBounds
    entropy: Tensor | None = None  # differentiable
    sequence_ids: Tensor | None = None  # int64; the sequence aggregations need it where no sequence is split,
    response_starts: Tensor | None = None  # and these two of MicroBatch where context ranks share one
    response_lengths: Tensor | None = None
    aggregation: str = "token_mean"  # key of algorithm.losses.AGGREGATIONS
    dual_clip: float | None = None  # c: with A < 0 the loss is at most -A c
    log_ratio_clamp: float = 20.0  # |log ratio| above it is clamped and carries no gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss leaves a rank as (sum, count); it is divided once, by the count over all ranks."""

    loss_sum: Tensor  # scalar, connected to the graph even when nothing counts
    count: Tensor  # scalar int, tokens or sequences, by the aggregation
    metrics: MetricSums
