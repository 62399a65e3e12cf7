"""From the statistics of a micro-batch to its loss: bounds by this step's blend, then the chosen policy loss."""

from __future__ import annotations

from megatron_fec.algorithm.losses import POLICY_LOSSES
from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds
from megatron_fec.config import AlgorithmConfig
from megatron_fec.policy.step import TokenLoss
from megatron_fec.types import BlendWeights, LossInputs, LossOutput, MicroBatch, TokenStats


def policy_token_loss(algorithm: AlgorithmConfig, weights: BlendWeights) -> TokenLoss:
    """The loss of one micro-batch under this step's blend of thresholds."""
    settings = algorithm.thresholds
    lines = ThresholdLines(
        eps_std=settings.eps_std,
        upper=(settings.upper[0], settings.upper[1]),
        lower=(settings.lower[0], settings.lower[1]),
    )
    policy_loss = POLICY_LOSSES[algorithm.policy_loss]

    def token_loss(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
        assert micro_batch.old_logprobs is not None
        inputs = LossInputs(
            logprobs=stats.logprobs,
            old_logprobs=micro_batch.old_logprobs,
            advantages=micro_batch.advantages,
            response_mask=micro_batch.response_mask,
            bounds=clip_bounds(stats.logprobs.detach().exp(), weights, lines=lines),
            entropy=stats.entropy,
            sequence_ids=micro_batch.sequence_ids,
            response_starts=micro_batch.response_starts,
            response_lengths=micro_batch.response_lengths,
            aggregation=algorithm.aggregation,
            dual_clip=algorithm.dual_clip,
            log_ratio_clamp=algorithm.log_ratio_clamp,
        )
        return policy_loss(inputs)

    return token_loss
