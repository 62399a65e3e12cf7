"""Supervised steps on demonstrations, through the same Megatron policy that is then reinforced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_fec.algorithm.losses import negative_log_likelihood
from megatron_fec.config import WarmStartConfig
from megatron_fec.policy.nonfinite import NonFiniteError
from megatron_fec.policy.step import Policy, reduce_metrics, train_update
from megatron_fec.rollout.packing import PackLayout, pack_demonstrations
from megatron_fec.types import LossOutput, MicroBatch, TokenStats

BATCH_SIZE = 256  # sequences of one step
LEARNING_RATE = 2e-3  # decayed to 0
NOTE_EVERY = 50  # steps

Demonstration = tuple[
    Sequence[int], Sequence[int]
]  # token ids of a prompt and of its response, end token included


def run_warm_start(
    policy: Policy,
    demonstrations: Sequence[Demonstration],
    settings: WarmStartConfig,
    *,
    layout: PackLayout,
    note: Callable[[str], None],
    before_step: Callable[[], None],
) -> None:
    """One optimizer step per batch of demonstrations, in their order; the loss is the mean over response tokens."""
    for step in range(settings.steps):
        before_step()
        batch = demonstrations[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        policy.scheduler.step(increment=1)
        try:
            sums, _ = train_update(policy, pack_demonstrations(batch, layout=layout), _supervised)
        except NonFiniteError as error:
            raise RuntimeError(f"warm start step {step}: {error}.") from error
        if step % NOTE_EVERY == 0 or step == settings.steps - 1:
            means = reduce_metrics(sums, policy.layout).means()
            note(
                f"warm start {step + 1}/{settings.steps}  loss {means['loss']:.3f}  entropy {means['entropy']:.3f}"
            )


def _supervised(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
    return negative_log_likelihood(stats.logprobs, stats.entropy, micro_batch.response_mask)
