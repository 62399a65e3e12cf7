"""What entropy control costs in an update: schedule id with dynamic bounds beside plain GRPO, in turns in one run.

    python benchmarks/train_step.py [--repeats 20] [--out FILE.md]                 # a small model, CPU ranks
    torchrun --nproc-per-node 8 benchmarks/train_step.py --config configs/qwen7b_id.yaml model.path=/models/Qwen2.5-7B

Three kinds of update, of the same tokens through the same policy: `entropy control` (schedule id in the middle of its
run), `grpo` (schedule grpo: the static clip range, with the entropy and its metrics that every run of ours logs), and
`log-probs only` (a GRPO as others write it: no entropy, no second moments, no metrics). CPU: seconds of processor time,
summed over ranks; GPU: elapsed, the slowest rank's. MFU is printed where the GPU's peak is known.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the tests' ranks

from policy_bench import Subject, folder_for_model, in_turns, on_ranks, spread, subject

from megatron_fec.algorithm.schedules import build_schedule
from megatron_fec.config import AlgorithmConfig, ScheduleConfig
from megatron_fec.metrics import MetricSums
from megatron_fec.policy.device import device
from megatron_fec.policy.model import PolicyModel, load_hf_config
from megatron_fec.policy.step import Policy, TokenLoss, compute_logprobs, cores, train_update
from megatron_fec.rollout.packing import PackLayout, pack, with_sample_values
from megatron_fec.token_loss import policy_token_loss
from megatron_fec.types import BlendWeights, LossOutput, MicroBatch, Prompt, Sample, SampleGroup, TokenStats

CONTROL, GRPO, BARE = "entropy control", "grpo", "log-probs only"
LIMIT = 0.01  # of the issue: what entropy control may cost
# Dense bf16 FLOP/s by the name that CUDA gives: NVIDIA's data sheets of A100, H100 SXM, H200 SXM and B200.
PEAKS = {"A100": 312e12, "H100 80GB HBM3": 989.4e12, "H200": 989.4e12, "B200": 2250e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    prompts: int = 4
    group_size: int = 4
    prompt_tokens: int = 32
    response_tokens: int = 224

    @property
    def tokens(self) -> int:
        return self.prompts * self.group_size * (self.prompt_tokens + self.response_tokens)


def update_batch(policy: Policy, batch: Batch, vocab_size: int, micro_batch_tokens: int) -> list[MicroBatch]:
    """This rank's micro-batches of random tokens, with old log-probs of the policy and advantages."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())

    def sample() -> Sample:
        zeros = (0.0,) * batch.response_tokens
        return Sample(
            token_ids=ids(len(zeros)), logprobs=zeros, text="", is_truncated=False, weight_version=0
        )

    groups = [
        SampleGroup(
            prompt=Prompt(prompt_id=i, text="", token_ids=ids(batch.prompt_tokens), answer="", verifier=""),
            samples=tuple(sample() for _ in range(batch.group_size)),
        )
        for i in range(batch.prompts)
    ]
    layout = policy.layout
    packing = PackLayout(
        data_parallel_rank=layout.data_parallel_rank,
        data_parallel_size=layout.data_parallel,
        micro_batch_tokens=micro_batch_tokens,
        multiple=layout.tensor_parallel,
        context_parallel_rank=layout.context_parallel_rank,
        context_parallel_size=layout.context_parallel,
    )
    packed = pack(groups, layout=packing, prompts_per_update=batch.prompts, seed=0)
    filled, _ = compute_logprobs(policy, packed)
    advantages = torch.randn(batch.prompts, batch.group_size, generator=generator)
    return with_sample_values(filled, advantages=advantages)[0]


def token_losses(batch: Batch, policy: Policy) -> dict[str, TokenLoss]:
    """The loss of each kind of update."""
    layout = policy.layout
    group = layout.context_group if layout.context_parallel > 1 else None
    schedule = ScheduleConfig(name="id", total_steps=100, options={"lower_schedule": "text"})
    algorithm = AlgorithmConfig(schedule=schedule, prompts_per_update=batch.prompts)
    weights = {
        CONTROL: build_schedule(schedule).weights(50, 1.0),
        GRPO: BlendWeights(upper=0.0, lower=0.0),
    }
    settings: dict[str, Any] = {
        "max_response_tokens": batch.response_tokens,
        "context_group": group,
        "seed": 0,
    }
    ours = {name: policy_token_loss(algorithm, w, **settings) for name, w in weights.items()}
    return ours | {BARE: bare_grpo}


def bare_grpo(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
    """The clipped surrogate of GRPO with a static range, and nothing else."""
    mask = micro_batch.response_mask
    assert micro_batch.old_logprobs is not None and micro_batch.advantages is not None
    ratio = (stats.logprobs - micro_batch.old_logprobs).exp()
    kept = torch.minimum(
        ratio * micro_batch.advantages, ratio.clamp(0.8, 1.2) * micro_batch.advantages
    ).where(mask, 0.0)
    count = mask.sum()
    return LossOutput(loss_sum=-kept.sum(), count=count, metrics=MetricSums.of({"nothing": (count, count)}))


def updates(
    policy: Policy, micro_batches: Sequence[MicroBatch], batch: Batch
) -> dict[str, Callable[[], object]]:
    """One update of each kind."""
    core = cores(policy)[0]
    plain = type(core)

    def without_entropy(token_loss: TokenLoss) -> None:
        core.__class__ = _LogprobsOnly
        try:
            train_update(policy, micro_batches, token_loss)
        finally:
            core.__class__ = plain

    losses = token_losses(batch, policy)
    works: dict[str, Callable[[], object]] = {
        name: partial(train_update, policy, micro_batches, losses[name]) for name in (CONTROL, GRPO)
    }
    return works | {BARE: partial(without_entropy, losses[BARE])}


class _LogprobsOnly(PolicyModel):
    """The policy without what train_update asks of it for the metrics."""

    def _softmax_settings(self) -> dict[str, Any]:
        return super()._softmax_settings() | {"second_moments": False}


def measured(policy: Policy, chosen: Subject, batch: Batch, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat on this rank."""
    micro_batches = update_batch(policy, batch, chosen.vocab_size, chosen.settings.micro_batch_tokens)
    return in_turns(updates(policy, micro_batches, batch), repeats)


def over_ranks(ranks: Sequence[dict[str, list[float]]], *, is_cpu: bool) -> dict[str, list[float]]:
    """Seconds of each repeat: the sum of processor time, or the slowest rank's elapsed time."""
    join = sum if is_cpu else max
    return {
        name: [join(values) for values in zip(*(r[name] for r in ranks), strict=True)] for name in ranks[0]
    }


def flops_per_token(model_dir: str, length: int) -> float:
    """Of forward and backward: 6 for each weight that multiplies a token, and causal attention; no recompute."""
    c: Any = load_hf_config(str(model_dir))
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attention = c.hidden_size * head * 2 * (c.num_attention_heads + c.num_key_value_heads)
    weights = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    weights += c.hidden_size * c.vocab_size
    return 6.0 * weights + 6.0 * c.num_hidden_layers * c.num_attention_heads * head * length


def report(chosen: Subject, batch: Batch, seconds: dict[str, list[float]], *, ranks: int) -> str:
    """The table and the two ratios as Markdown."""
    is_cpu = device().type == "cpu"
    name = "CPU" if is_cpu else torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    lines = [
        f"{chosen.name}; {batch.tokens} tokens an update, {ranks} ranks on {name}, "
        f"{len(next(iter(seconds.values())))} repeats in turns.",
        "",
        f"| update | {'processor seconds, all ranks' if is_cpu else 'seconds'} | tokens/s | MFU |",
        "|---|---|---|---|",
    ]
    for kind, values in seconds.items():
        middle, low, high = spread(values)
        rate = batch.tokens / middle
        flops = rate * flops_per_token(chosen.model_dir, batch.prompt_tokens + batch.response_tokens)
        mfu = f"{flops / (peak * ranks):.1%}" if peak else "-"
        lines.append(f"| {kind} | {middle:.4f} ({low:.4f} to {high:.4f}) | {rate:.0f} | {mfu} |")
    lines.append("")
    for base in (GRPO, BARE):
        middle, low, high = spread([a / b - 1 for a, b in zip(seconds[CONTROL], seconds[base], strict=True)])
        lines.append(
            f"{CONTROL} against {base}: {middle:+.2%} (median of the repeats; quartiles {low:+.2%} to {high:+.2%}), "
            f"fastest against fastest {min(seconds[CONTROL]) / min(seconds[base]) - 1:+.2%}; the limit is {LIMIT:.0%}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--config", type=Path, help="model and layout; default: a small model on one CPU rank"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--response-tokens", type=int, default=224)
    parser.add_argument("--out", type=Path, help="a Markdown file that gets the result too")
    parser.add_argument("overrides", nargs="*", help="key=value, with --config")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    batch = replace(Batch(), prompts=arguments.prompts, response_tokens=arguments.response_tokens)
    with folder_for_model() as folder:
        chosen = subject(arguments.config, arguments.overrides, Path(folder))
        job = partial(measured, chosen=chosen, batch=batch, repeats=arguments.repeats)
        ranks = on_ranks(chosen, job)
        if ranks is None:
            return
        text = report(chosen, batch, over_ranks(ranks, is_cpu=device().type == "cpu"), ranks=len(ranks))
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
