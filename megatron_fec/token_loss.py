"""From the statistics of a micro-batch to its loss: bounds by this step's blend, the chosen policy loss, the instruments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.distributed import ProcessGroup

from megatron_fec.algorithm.entropy_change import entropy_change_metrics, token_gradients
from megatron_fec.algorithm.losses import MARKS
from megatron_fec.algorithm.strategies import build_policy_loss, marks_of
from megatron_fec.algorithm.thresholds import clip_bounds, threshold_lines
from megatron_fec.config import AlgorithmConfig
from megatron_fec.metrics import MetricSums
from megatron_fec.policy.step import TokenLoss
from megatron_fec.seeds import derive_seed
from megatron_fec.types import BlendWeights, LossInputs, LossOutput, MicroBatch, TokenStats

Observer = Callable[..., None]  # (*, micro_batch, stats)


def policy_token_loss(
    algorithm: AlgorithmConfig,
    weights: BlendWeights,
    *,
    max_response_tokens: int,
    context_group: ProcessGroup | None,
    seed: int,
    observe: Observer | None = None,
) -> TokenLoss:
    """The loss of one micro-batch under this step's blend of thresholds, with the entropy change that it predicts.

    context_group: the ranks that share each sequence, or None. seed: of the update. observe sees every micro-batch.
    """
    lines = threshold_lines(algorithm.thresholds)
    policy_loss = build_policy_loss(algorithm.policy_loss, algorithm.options)
    # Other losses draw nothing inside a micro-batch, and the seed would wait for the GPU.
    name, options = algorithm.policy_loss, algorithm.options
    draws = name.split("+")[0] in MARKS and marks_of(name, options) is None

    def token_loss(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
        assert micro_batch.old_logprobs is not None
        inputs = LossInputs(
            logprobs=stats.logprobs,
            old_logprobs=micro_batch.old_logprobs,
            advantages=micro_batch.advantages,
            response_mask=micro_batch.response_mask,
            bounds=clip_bounds(stats.logprobs.detach().exp(), weights, lines=lines),
            entropy=stats.entropy,
            alignment=stats.alignment,
            rollout_logprobs=micro_batch.rollout_logprobs,
            reference_logprobs=micro_batch.reference_logprobs,
            entropy_coefs=micro_batch.entropy_coefs,
            marks=micro_batch.marks,
            sequence_ids=micro_batch.sequence_ids,
            response_starts=micro_batch.response_starts,
            response_lengths=micro_batch.response_lengths,
            update_lengths=micro_batch.update_lengths,
            max_response_tokens=max_response_tokens,
            context_group=context_group,
            aggregation=algorithm.aggregation,
            # Of this micro-batch alone: its largest sequence id is on no other rank.
            seed=derive_seed(seed, "micro_batch", int(micro_batch.sequence_ids.max())) if draws else 0,
        )
        if observe is not None:
            observe(micro_batch=micro_batch, stats=stats)
        output = policy_loss(inputs)
        gradients = token_gradients(policy_loss, inputs)
        predicted = entropy_change_metrics(gradients, inputs, old_entropy=micro_batch.old_entropy)
        return replace(output, metrics=output.metrics.joined(MetricSums.of(predicted)))

    return token_loss
