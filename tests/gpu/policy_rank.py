"""Started by the tests of this folder under torchrun: trains a small policy on GPUs and writes what it saw.

argv: a JSON object with model, out, settings (of PolicyConfig), layers (local | engine), steps, and check, whether the
FP8 monitor looks at the last step. Rank 0 writes `out`, read by torch.load.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from policy_fixtures import (
    WEIGHTS,
    clip_token_loss,
    copied_weights,
    make_groups,
    nll_token_loss,
    off_policy,
    old_logprob_table,
    pack_for,
)

from megatron_fec.algorithm.thresholds import ThresholdLines
from megatron_fec.config import OptimizerConfig, PolicyConfig
from megatron_fec.policy import layer_spec
from megatron_fec.policy.kernels import Installed, kernel_lines
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.precision_check import in_bf16, start_check
from megatron_fec.policy.step import Policy, build_policy, compute_logprobs, reduce_metrics, train_update
from megatron_fec.precision_rules import token_multiple

VOCABULARY = 37
LEARNING_RATE = 1e-3


def main(job: dict[str, Any]) -> None:
    if job["layers"] == "local":
        layer_spec.HAS_TRANSFORMER_ENGINE = False
    settings = PolicyConfig(**job["settings"])
    layout = initialize_parallel(settings, seed=3)
    policy = build_policy(
        job["model"],
        settings,
        OptimizerConfig(lr=LEARNING_RATE, clip_grad=1e9),
        layout=layout,
        temperature=1.0,
        total_steps=1000,
        vocab_size=VOCABULARY,
    )
    ((batch,),) = pack_for(policy, make_groups(), multiple=token_multiple(settings))
    filled, on_policy = compute_logprobs(policy, [[batch]])
    seen: dict[str, Any] = {
        "installed": asdict(Installed.here()),
        "lines": kernel_lines(settings, policy.bridge.config, policy.optimizer),
        "on_policy": on_policy.means(),
        "loaded": copied_weights(policy),
        "tokens": _tokens(filled[0][0]),
    }
    with in_bf16(policy):
        seen["tokens_bf16"] = _tokens(compute_logprobs(policy, [[batch]])[0][0][0])
    _train(policy, filled[0][0], job, seen)
    seen["weights"] = copied_weights(policy)
    if dist.get_rank() == 0:
        torch.save(seen, job["out"])
    dist.barrier()
    dist.destroy_process_group()


def _train(policy: Policy, batch: Any, job: dict[str, Any], seen: dict[str, Any]) -> None:
    """First one clipped update off policy, for its gradient; then supervised steps."""
    table = old_logprob_table(Path(job["model"])).to(batch.tokens.device)
    check = start_check(policy, [[off_policy(batch, table)]], draw=0) if job["check"] else None
    policy.scheduler.step(1)
    sums, seen["grad_norm"] = train_update(policy, [off_policy(batch, table)], clip_token_loss)
    seen["update"] = reduce_metrics(sums, policy.layout).means()
    seen["losses"] = []
    for _ in range(job["steps"]):
        policy.scheduler.step(1)
        sums, _ = train_update(policy, [batch], nll_token_loss)
        seen["losses"].append(reduce_metrics(sums, policy.layout).means()["loss"])
    if check is not None:
        seen["check"] = check.finish(WEIGHTS, lines=ThresholdLines())


def _tokens(batch: Any) -> dict[tuple[int, int], float]:
    """Log-prob of each response token by (sample, position)."""
    mask = batch.response_mask
    columns = (batch.sequence_ids, batch.position_ids, batch.old_logprobs)
    return {(s, p): x for s, p, x in zip(*(c[mask].tolist() for c in columns), strict=True)}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
