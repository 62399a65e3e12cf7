"""One pass over micro-batches through Megatron's schedules: log-probs before training, and the training update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.distributed as dist
from mbridge.core.llm_bridge import LLMBridge
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_fec.config import OptimizerConfig, PolicyConfig
from megatron_fec.metrics import MetricSums
from megatron_fec.policy.device import device
from megatron_fec.policy.expert_weights import GroupedNames
from megatron_fec.policy.fp8_weights import plain_weights
from megatron_fec.policy.kernels import check_kernels
from megatron_fec.policy.model import PolicyModel, build_bridge, build_model, forward, load_hf_config
from megatron_fec.policy.nonfinite import GRADIENTS, LOGPROBS, LOSS, NORM, GradientWatch, check_finite
from megatron_fec.policy.optimizer import build_optimizer, clip_gradients, wrap_ddp
from megatron_fec.policy.parallel import ParallelLayout, check_model_sizes
from megatron_fec.policy.routing import RoutingTape, attach_tapes, routing
from megatron_fec.policy.tensor_overlap import initialize_tp_overlap
from megatron_fec.policy_options import options_of_policy
from megatron_fec.types import LossOutput, MicroBatch, TokenStats

TokenLoss = Callable[[TokenStats, MicroBatch], LossOutput]


@dataclass(slots=True, kw_only=True)
class Policy:
    """The model, its optimizer and what is needed to run them; every rank holds one."""

    chunks: list[
        DistributedDataParallel
    ]  # this rank's parts of the model, virtual stages in order; one without them
    bridge: LLMBridge
    layout: ParallelLayout
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    clip_grad: float
    gradients: GradientWatch
    tapes: list[RoutingTape]  # of the routers, where policy.options.router=replay

    def train(self, mode: bool = True) -> None:
        """Train or eval mode of all chunks, as torch.nn.Module.train."""
        for chunk in self.chunks:
            chunk.train(mode)


def build_policy(
    model_path: str,
    policy: PolicyConfig,
    optimizer: OptimizerConfig,
    *,
    layout: ParallelLayout,
    temperature: float,
    total_steps: int,
    vocab_size: int,
) -> Policy:
    """The policy of a Hugging Face checkpoint on this layout, weights loaded, ready to train."""
    check_kernels(policy)
    hf_config = load_hf_config(model_path)
    check_model_sizes(hf_config, policy)
    bridge = build_bridge(hf_config, policy)
    initialize_tp_overlap(policy, hidden_size=hf_config.hidden_size)
    models = [
        build_model(
            bridge,
            layout,
            temperature=temperature,
            vocab_size=vocab_size,
            logits_chunk_tokens=policy.logits_chunk_tokens,
            virtual_stage=virtual_stage,
        )
        for virtual_stage in range(layout.virtual_stages)
    ]
    with plain_weights([unwrapped(model) for model in models], keep=True):
        bridge.load_weights([GroupedNames(unwrapped(model)) for model in models], model_path)  # type: ignore[list-item]
    gradients = GradientWatch(is_reduced=options_of_policy(policy).overlap)
    chunks = wrap_ddp(models, bridge.config, policy, gradients)
    built, scheduler = build_optimizer(chunks, policy, optimizer, total_steps=total_steps)
    return Policy(
        chunks=chunks,
        bridge=bridge,
        layout=layout,
        optimizer=built,
        scheduler=scheduler,
        clip_grad=optimizer.clip_grad,
        gradients=gradients,
        tapes=attach_tapes(models) if options_of_policy(policy).router == "replay" else [],
    )


def compute_logprobs(
    policy: Policy, updates: Sequence[Sequence[MicroBatch]]
) -> tuple[list[list[MicroBatch]], MetricSums]:
    """The micro-batches with old_logprobs and old_entropy, and the sums of entropy and of |trainer - engine| log-prob.

    Forward only, through the kernel of training, so that the first update's ratio is exactly 1. The sums are those of
    the whole batch, equal on every rank. Off the last pipeline stage the micro-batches come back without log-probs.
    With router=replay they all come back with their routing.
    A log-prob that is not finite raises NonFiniteError on every rank.
    """
    filled: list[list[MicroBatch]] = []
    is_finite = torch.tensor(True, device=device())
    sums: list[MetricSums] = []
    for update in updates:
        pairs = token_statistics(policy, update, second_moments=False, record_routing=True)
        filled.append(
            [
                mb if s is None else replace(mb, old_logprobs=s.logprobs, old_entropy=s.entropy)
                for mb, s in pairs
            ]
        )
        sums += [_on_policy_sums(mb, s) for mb, s in pairs if s is not None]
        for mb, s in pairs:
            is_finite &= s is None or _finite_logprobs(mb, s)
    check_finite(policy.chunks, policy.layout, {LOGPROBS: is_finite})
    return filled, reduce_metrics(sums, policy.layout)


def token_statistics(
    policy: Policy, update: Sequence[MicroBatch], *, second_moments: bool, record_routing: bool = False
) -> list[tuple[MicroBatch, TokenStats | None]]:
    """Each micro-batch, on its device, with its statistics under the current weights; None off the last stage.

    Tokens are routed as MicroBatch.routing says, if it is filled. With record_routing they are routed by the current
    weights, and the micro-batches come back with it where router=replay.
    """
    policy.train(False)
    for core in cores(policy):
        core.second_moments = second_moments
    micro_batches = [_on_device(micro_batch) for micro_batch in update]
    # Any number will do here: the last one is repeated where the schedule wants more, and its copies are dropped.
    copies = micro_batches[-1:] * (-len(micro_batches) % policy.layout.micro_batch_multiple)
    fed = [*micro_batches, *copies]
    with routing(policy.tapes, fed, record=record_routing) as kept:
        stats = _run(policy, fed, _keep_stats, forward_only=True)[: len(micro_batches)]
    if kept:
        micro_batches = [
            replace(mb, routing=own)
            for mb, own in zip(micro_batches, kept[: len(micro_batches)], strict=True)
        ]
    policy.train()
    return list(zip(micro_batches, stats or [None] * len(micro_batches), strict=True))


def train_update(
    policy: Policy, micro_batches: Sequence[MicroBatch], token_loss: TokenLoss
) -> tuple[list[MetricSums], float]:
    """One optimizer step. Returns this rank's metric sums (empty off the last stage) and the gradient norm.

    The loss sum over all tokens of all ranks is divided once, by the all-reduced count, in Megatron's finalize step.
    A log-prob, loss or gradient that is not finite raises NonFiniteError on every rank before the optimizer moves.
    """
    micro_batches = [_on_device(micro_batch) for micro_batch in micro_batches]
    policy.train()
    for core in cores(policy):
        core.second_moments = True  # of the metrics; the same collective carries them
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    with routing(policy.tapes, micro_batches):
        results = _run(policy, micro_batches, partial(_loss, token_loss), forward_only=False)
    policy.optimizer.prepare_grads()
    grad_norm = clip_gradients(policy.optimizer, policy.clip_grad)
    flags = torch.stack([flags for _, flags in results] or [torch.ones(2, dtype=torch.bool)]).all(0)
    is_finite = {
        LOGPROBS: flags[0],
        LOSS: flags[1],
        GRADIENTS: policy.gradients.is_finite,
        NORM: math.isfinite(grad_norm),
    }
    check_finite(policy.chunks, policy.layout, is_finite)
    policy.optimizer.step_with_ready_grads()
    return [metrics for metrics, _ in results], grad_norm


def reduce_metrics(sums: Sequence[MetricSums], layout: ParallelLayout) -> MetricSums:
    """The sum over micro-batches and ranks, the same bits on every rank; only last-stage ranks bring any.

    Reduced over DP x CP, then broadcast from one rank, so that all take the same decision from it.
    """
    total: MetricSums | None = None
    if layout.is_last_stage:
        total = sum(sums[1:], sums[0])
        flat = total.flat()
        dist.all_reduce(flat, group=layout.data_group)
        total = total.replaced(flat.cpu())
    # Pipeline stages are the slowest axis of the ranks, so the last stage starts here.
    source = dist.get_world_size() // layout.pipeline_parallel * (layout.pipeline_parallel - 1)
    box = [total]
    dist.broadcast_object_list(box, src=source)
    assert box[0] is not None
    return box[0]


def cores(policy: Policy) -> list[PolicyModel]:
    """The GPTModel of each chunk."""
    models = [unwrapped(chunk) for chunk in policy.chunks]
    assert all(isinstance(model, PolicyModel) for model in models)
    return models  # type: ignore[return-value]


def gather_weights(policy: Policy) -> None:
    """Makes this rank's weights whole: call it before they are read other than by a forward pass.

    With policy.options.overlap an update leaves each rank of the distributed optimizer with its own shard of the new
    weights; the next forward gathers the others layer by layer. Collective over the data-parallel ranks; free otherwise.
    """
    for chunk in policy.chunks:
        if chunk.ddp_config.overlap_param_gather:
            # Not start_param_sync(force_sync=True): in 0.16 it leaves out what FP8 weights need after a gather.
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel below DDP and the bf16 wrapper."""
    while hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    return model


def _run(policy: Policy, micro_batches: Sequence[MicroBatch], use: Callable, *, forward_only: bool) -> list:
    """Megatron's schedule over the micro-batches; what `use` returned third, per micro-batch, on the last stage."""

    def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple:
        micro_batch = next(iterator)
        return forward(model, micro_batch), partial(use, micro_batch)

    lengths = {micro_batch.tokens.numel() for micro_batch in micro_batches}
    assert len(lengths) == 1, "the pipeline schedule sends tensors of one length"
    assert len(micro_batches) % policy.layout.micro_batch_multiple == 0, "see PackLayout.micro_batch_multiple"
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in policy.chunks],
            model=list(policy.chunks),
            num_microbatches=len(micro_batches),
            seq_length=lengths.pop() * policy.layout.context_parallel,  # megatron divides it again
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _on_device(micro_batch: MicroBatch) -> MicroBatch:
    """Its tensors where this rank computes; those that are there already are not copied."""
    tensors = {f.name: getattr(micro_batch, f.name) for f in fields(micro_batch)}
    return replace(micro_batch, **{n: t.to(device()) for n, t in tensors.items() if isinstance(t, Tensor)})


def _keep_stats(micro_batch: MicroBatch, stats: TokenStats) -> tuple[Tensor, Tensor, TokenStats]:
    nothing = torch.zeros((), dtype=torch.int, device=stats.logprobs.device)
    return stats.logprobs.sum(), nothing, stats


def _loss(
    token_loss: TokenLoss, micro_batch: MicroBatch, stats: TokenStats
) -> tuple[Tensor, Tensor, tuple[MetricSums, Tensor]]:
    """Third: the metrics, and whether log-probs and loss are finite, [2] bool."""
    out = token_loss(stats, micro_batch)
    flags = torch.stack([_finite_logprobs(micro_batch, stats), out.loss_sum.isfinite()])
    metrics = out.metrics.with_pair("loss", (out.loss_sum, out.count))
    return out.loss_sum, out.count.int(), (metrics, flags)


def _finite_logprobs(micro_batch: MicroBatch, stats: TokenStats) -> Tensor:
    return (stats.logprobs.isfinite() | ~micro_batch.response_mask).all()


def _on_policy_sums(micro_batch: MicroBatch, stats: TokenStats) -> MetricSums:
    mask = micro_batch.response_mask
    count = mask.sum()
    mismatch = (stats.logprobs - micro_batch.rollout_logprobs)[mask]
    return MetricSums.of(
        {
            "entropy": (stats.entropy[mask].double().sum(), count),
            "mismatch": (mismatch.double().abs().sum(), count),
            "logprob": (stats.logprobs[mask].double().sum(), count),
        }
    )
