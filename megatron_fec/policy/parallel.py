"""Process groups of the layout, and the rules that tie a checkpoint's sizes to it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_fec.config import ConfigError, PolicyConfig
from megatron_fec.policy.device import backend, prepare_device
from megatron_fec.policy.experts import check_expert_sizes, check_expert_world, num_experts
from megatron_fec.policy_options import micro_batch_multiple, options_of_policy
from megatron_fec.precision_rules import check_fp8_sizes

COLLECTIVE_DEADLINE = timedelta(minutes=30)  # a rank that waits longer names the collective and stops


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """This rank's place; groups are torch ProcessGroups."""

    tensor_parallel: int
    pipeline_parallel: int
    virtual_stages: int  # model chunks of this rank
    context_parallel: int
    context_parallel_rank: int
    data_parallel: int
    data_parallel_rank: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup  # DP x CP: its ranks hold different tokens under the same weights
    context_group: dist.ProcessGroup  # its ranks hold parts of the same sequences
    expert_group: dist.ProcessGroup  # its ranks hold other experts of the same layers
    expert_tensor_group: dist.ProcessGroup  # its ranks hold parts of the same experts
    micro_batch_multiple: int  # of an update: policy_options.micro_batch_multiple
    is_last_stage: bool

    @property
    def reports_metrics(self) -> bool:
        """True on one rank of each DP x CP rank: what these ranks hold, added up, is the whole batch."""
        return self.is_last_stage and dist.get_rank(self.tensor_group) == 0


def initialize_parallel(policy: PolicyConfig, *, seed: int) -> ParallelLayout:
    """Process groups over the world that torchrun made; callable once per process."""
    prepare_device()
    if not dist.is_initialized():
        dist.init_process_group(backend(), timeout=COLLECTIVE_DEADLINE)
    check_world(policy, world_size=dist.get_world_size())
    options = options_of_policy(policy)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=policy.tensor_parallel,
        pipeline_model_parallel_size=policy.pipeline_parallel,
        virtual_pipeline_model_parallel_size=options.virtual_stages if options.virtual_stages > 1 else None,
        context_parallel_size=policy.context_parallel,
        expert_model_parallel_size=options.expert_parallel,
        expert_tensor_parallel_size=options.expert_tensor_parallel,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    assert isinstance(tensor_group, dist.ProcessGroup) and isinstance(pipeline_group, dist.ProcessGroup)
    context_group = parallel_state.get_context_parallel_group()
    assert isinstance(data_group, dist.ProcessGroup) and isinstance(context_group, dist.ProcessGroup)
    expert_group = parallel_state.get_expert_model_parallel_group()
    expert_tensor_group = parallel_state.get_expert_tensor_parallel_group()
    assert isinstance(expert_group, dist.ProcessGroup) and isinstance(expert_tensor_group, dist.ProcessGroup)
    return ParallelLayout(
        tensor_parallel=policy.tensor_parallel,
        pipeline_parallel=policy.pipeline_parallel,
        virtual_stages=options.virtual_stages,
        micro_batch_multiple=micro_batch_multiple(policy),
        context_parallel=policy.context_parallel,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        data_parallel=parallel_state.get_data_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        tensor_group=tensor_group,
        pipeline_group=pipeline_group,
        data_group=data_group,
        context_group=context_group,
        expert_group=expert_group,
        expert_tensor_group=expert_tensor_group,
        is_last_stage=parallel_state.is_pipeline_last_stage(),
    )


def check_world(policy: PolicyConfig, *, world_size: int) -> None:
    """The layout must fill the world."""
    model_size = policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel
    if world_size % model_size:
        raise ConfigError(
            f"policy.tensor_parallel={policy.tensor_parallel} x policy.pipeline_parallel={policy.pipeline_parallel} "
            f"x policy.context_parallel={policy.context_parallel} = {model_size} must divide the {world_size} "
            f"processes of this run. Start a multiple of {model_size} or shrink the layout."
        )
    check_expert_world(policy, world_size=world_size)


def check_model_sizes(hf_config: Any, policy: PolicyConfig) -> None:
    """Heads, key-value heads, feed-forward width and layers must divide; needs only the checkpoint's config.json."""
    tp, pp = policy.tensor_parallel, policy.pipeline_parallel
    check_expert_sizes(hf_config, policy)
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size")
    for name in (n for n in sizes if not (num_experts(hf_config) and n == "intermediate_size")):
        size = getattr(hf_config, name)
        if size % tp:
            raise ConfigError(
                f"policy.tensor_parallel={tp} must divide the checkpoint's {name}={size}. "
                f"Use one of {_divisors(size, limit=8)}."
            )
    _check_stages(hf_config.num_hidden_layers, pp, options_of_policy(policy).virtual_stages)
    check_fp8_sizes(hf_config, policy)


def _check_stages(layers: int, stages: int, virtual: int) -> None:
    """Every chunk of every stage holds the same number of layers, at least one."""
    pieces = f"policy.pipeline_parallel={stages}"
    if virtual > 1:
        pieces += f" x policy.options.virtual_stages={virtual} = {stages * virtual}"
    if stages * virtual > layers:
        raise ConfigError(
            f"{pieces} exceeds the checkpoint's num_hidden_layers={layers}: a stage would have no layer. "
            f"Use at most {layers} in all, a divisor of {layers}."
        )
    if layers % stages:
        raise ConfigError(
            f"policy.pipeline_parallel={stages} must divide the checkpoint's num_hidden_layers={layers}. "
            f"Use one of {_divisors(layers, limit=8)}."
        )
    if layers % (stages * virtual):
        raise ConfigError(
            f"{pieces} must divide the checkpoint's num_hidden_layers={layers}. Use virtual_stages of "
            f"{_divisors(layers // stages, limit=layers // stages)}."
        )


def _divisors(size: int, *, limit: int) -> str:
    return ", ".join(str(d) for d in range(1, limit + 1) if size % d == 0)
