"""The data that flows through one step: Prompt -> Sample -> SampleGroup -> MicroBatch -> TokenStats -> ClipBounds.

Letters: T tokens of a packed micro-batch that a rank holds, V vocabulary, V_local a shard of it, N sequences of a
micro-batch.
Alignment holds everywhere: index t of any [T] tensor is about predicting `labels[t]`, the token after `tokens[t]`.

The text half (Prompt, Sample, SampleGroup) is used by verifier processes, so this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from megatron_fec.metrics import MetricSums

LOG_RATIO_CLAMP = 20.0  # |log ratio| above it is clamped and carries no gradient
IGNORED = -100  # a label with nothing to predict, as in torch's cross entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task, tokenized; the same object on every rank."""

    prompt_id: int  # row of the data set, after filtering
    text: str  # what the engine sees, rendered
    token_ids: tuple[int, ...]
    answer: str  # what the verifier compares with
    verifier: str  # key of tasks.scorers.SCORERS
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
    update_lengths: Tensor  # [S] int64, response tokens of each sequence of the update, on all ranks
    advantages: Tensor  # [T] fp32, 0 outside the response
    rollout_logprobs: Tensor  # [T] fp32, the engine's, 0 outside the response
    # The rest is filled by the trainer where it is needed, [T] fp32, on the last pipeline stage only.
    old_logprobs: Tensor | None = None  # before the first update of the step
    old_entropy: Tensor | None = None
    reference_logprobs: Tensor | None = None  # of the frozen reference policy
    entropy_coefs: Tensor | None = None  # of the entropy bonus, by sequence
    marks: Tensor | None = None  # what a loss chose over the whole update (algorithm.losses.MARKS)
    # [layers, T of this tensor rank, experts of a token] of this rank's layers, from the log-prob pass on, where
    # policy.options.router=replay; each pipeline and tensor rank has its own.
    routing: Tensor | None = None


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
    """All that a policy loss may look at; [T] tensors of one micro-batch.

    What is None by default is there only when it is needed; a loss that misses one says so.
    """

    logprobs: Tensor  # fp32, differentiable
    old_logprobs: Tensor
    advantages: Tensor
    response_mask: Tensor  # bool
    bounds: ClipBounds
    entropy: Tensor | None = None  # differentiable
    alignment: Tensor | None = None  # of TokenStats
    rollout_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    entropy_coefs: Tensor | None = None
    marks: Tensor | None = None
    weights: Tensor | None = None  # detached factor of each token's loss, such as an importance weight
    sequence_ids: Tensor | None = None  # int64; the sequence aggregations need it where no sequence is split,
    response_starts: Tensor | None = None  # and these two of MicroBatch where context ranks share one
    response_lengths: Tensor | None = None
    update_lengths: Tensor | None = None  # [S], of MicroBatch
    max_response_tokens: int | None = None  # the divisor of seq_mean_token_sum_norm
    context_group: ProcessGroup | None = None  # the ranks that share each sequence
    aggregation: str = "token_mean"  # key of algorithm.losses.AGGREGATIONS
    log_ratio_clamp: float = LOG_RATIO_CLAMP
    seed: int = 0  # of a choice at random inside this micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateTokens:
    """The response tokens of a whole update, or of one micro-batch: [N] tensors by sequence id, then by position."""

    logprobs: Tensor  # detached, of the current weights
    old_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor  # detached
    alignment: Tensor | None  # of TokenStats
    bounds: ClipBounds
    sequence_ids: Tensor  # int64
    log_ratio_clamp: float = LOG_RATIO_CLAMP
    seed: int  # of a choice at random, the same on every rank that holds the same tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss leaves a rank as (sum, count); it is divided once, by the count over all ranks."""

    loss_sum: Tensor  # scalar, connected to the graph even when nothing counts
    count: Tensor  # scalar int, tokens or sequences, by the aggregation
    metrics: MetricSums


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """What is added to a policy loss: a second loss, a factor of the first, or both; [T] tensors."""

    losses: Tensor | None = None  # differentiable, aggregated as the policy loss is
    weights: Tensor | None = None  # detached
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # [T] values whose token mean is reported
