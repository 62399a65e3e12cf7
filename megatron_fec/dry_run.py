"""What a run would do, without a GPU, without Slurm and without torch.distributed: launch/train.py --dry-run.

Sizes that do not fit are the errors of the run itself, from the same functions. The launcher prints its own srun line.
"""

from __future__ import annotations

import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from omegaconf import OmegaConf
from transformers.utils.logging import disable_progress_bar

from megatron_fec.algorithm.strategies import needs_reference
from megatron_fec.config import Config, PolicyConfig
from megatron_fec.context_split import sequence_multiple
from megatron_fec.planning.models import shipped_config
from megatron_fec.policy.model import DTYPES, load_hf_config
from megatron_fec.policy.parallel import check_world
from megatron_fec.policy.sizes import (
    StageMemory,
    data_parallel_size,
    parameter_count,
    places,
    stage_memory,
)
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.policy_options import micro_batch_multiple, options_of_policy
from megatron_fec.preflight import EMBEDDED, check_batch, check_engines, check_model
from megatron_fec.tasks.arithmetic import VOCABULARY

REACH_SECONDS = 5.0  # for the hub's first answer: its own client tries for half a minute
MEMORY_COLUMNS = (
    "stage",
    "parameters",
    "weights",
    "gradients",
    "optimizer",
    "logits",
    "sum",
    "optimizer if distributed",
    "if not",
)


def dry_run_text(config: Config, *, nodes: int, gpus_per_node: int) -> str:
    """Resolved configuration, rank layout, memory and batch arithmetic; ConfigError as the run would raise it."""
    world_size = nodes * gpus_per_node
    check_world(config.policy, world_size=world_size)
    data_parallel = data_parallel_size(config.policy, world_size)
    check_batch(config, data_parallel)
    if config.rollout.engine == "vllm":
        check_engines(config.rollout.tensor_parallel, world_size=world_size)
    hf_config, note = published_or_found(config)
    if hf_config is not None:
        check_model(config, hf_config)
    return "\n".join(
        [
            "# configuration",
            OmegaConf.to_yaml(OmegaConf.structured(config)).rstrip(),
            "",
            *_layout_lines(config, nodes, gpus_per_node),
            "",
            *([note] if note else []),
            *(_memory_lines(config, hf_config, world_size) if hf_config is not None else []),
            "",
            *_batch_lines(config, world_size),
        ]
    )


def published_or_found(config: Config) -> tuple[Any, str]:
    """As find_hf_config, but of an architecture that comes with the package and is not here, as published: asks nobody.

    The second says so then.
    """
    path = config.model.path
    shipped = shipped_config(path)
    if shipped is None or Path(path).is_dir() or isinstance(try_to_load_from_cache(path, "config.json"), str):
        return find_hf_config(config)
    return load_hf_config(str(shipped)), f"sizes of {path} as published, which the package holds"


def find_hf_config(config: Config) -> tuple[Any, str]:
    """(the checkpoint's configuration, ""), or (None, why it is not in reach): no weight is downloaded."""
    path = config.model.path
    if path == EMBEDDED:
        disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_model(Path(folder), VOCABULARY, seed=0)
            return load_hf_config(folder), ""
    if Path(path).is_dir():
        return load_hf_config(path), ""
    try:
        cached = try_to_load_from_cache(path, "config.json")
        if isinstance(cached, str):
            return load_hf_config(str(Path(cached).parent)), ""
        if constants.HF_HUB_OFFLINE:
            return None, _out_of_reach(path, "HF_HUB_OFFLINE is set and the cache has no config.json")
        _reach(hf_hub_url(path, "config.json"))
        return load_hf_config(str(Path(hf_hub_download(path, "config.json")).parent)), ""
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        return None, _out_of_reach(path, str(error).splitlines()[0])


def _reach(url: str) -> None:
    """Raises OSError unless a server answers, whatever it answers."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()


def _out_of_reach(path: str, why: str) -> str:
    return (
        f"model.path={path} is not in reach of this machine ({why}): memory is left out, and sizes were not checked "
        "against the checkpoint. Give a folder with config.json, or a hub name that is in the cache."
    )


def _layout_lines(config: Config, nodes: int, gpus_per_node: int) -> list[str]:
    policy, world_size = config.policy, nodes * gpus_per_node
    data_parallel = data_parallel_size(policy, world_size)
    lines = [
        f"# rank layout: {nodes} node{'s'[: nodes - 1]} x {gpus_per_node} GPUs = {world_size} ranks = "
        f"TP {policy.tensor_parallel} x CP {policy.context_parallel} x DP {data_parallel} x PP "
        f"{policy.pipeline_parallel}{_chunks(policy)}",
        "rank  node  gpu   TP   CP   DP   PP",
    ]
    lines += [
        f"{p.rank:4}  {p.rank // gpus_per_node:4}  {p.rank % gpus_per_node:3}  "
        f"{p.tensor:3}  {p.context:3}  {p.data:3}  {p.pipeline:3}"
        for p in places(policy, world_size)
    ]
    sizes = {"policy.tensor_parallel": policy.tensor_parallel}
    if config.rollout.engine == "vllm":
        sizes["rollout.tensor_parallel"] = config.rollout.tensor_parallel
    lines += [
        f"note: {setting}={size} does not divide the {gpus_per_node} GPUs of a node, so some of its groups span "
        "nodes, which is slow"
        for setting, size in sizes.items()
        if gpus_per_node % size
    ]
    return lines


def _chunks(policy: PolicyConfig) -> str:
    virtual = options_of_policy(policy).virtual_stages
    return f", {virtual} virtual stages on each" if virtual > 1 else ""


def _memory_lines(config: Config, hf_config: Any, world_size: int) -> list[str]:
    policy = config.policy
    stages = [
        stage_memory(hf_config, policy, s, world_size=world_size) for s in range(policy.pipeline_parallel)
    ]
    shards = data_parallel_size(policy, world_size) * policy.context_parallel
    kind = f"distributed over DP x CP = {shards}" if policy.distributed_optimizer else "not distributed"
    size, unit = (1e9, "GB (1e9 bytes)") if stages[-1].total >= 1e9 else (1e6, "MB (1e6 bytes)")
    rows = [MEMORY_COLUMNS, *(_memory_row(number, stage, size) for number, stage in enumerate(stages))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(MEMORY_COLUMNS))]
    tokens = policy.micro_batch_tokens // policy.context_parallel
    chunk = f", {policy.logits_chunk_tokens} of them at a time" if policy.logits_chunk_tokens else ""
    return [
        f"# memory of each GPU in {unit}; {parameter_count(hf_config):,} parameters in all, {policy.precision}, "
        f"optimizer {kind}",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        f"logits: of {tokens} tokens{chunk}, once, in {policy.precision}",
        *_host_lines(config, stages),
        f"NOT included: activations (recompute: {options_of_policy(policy).recompute}), communication buffers, CUDA "
        f"contexts, and {_engine_memory(config, hf_config)}",
    ]


def _host_lines(config: Config, stages: list[StageMemory]) -> list[str]:
    """The reference of a Kullback-Leibler term lies in host memory."""
    if not needs_reference(config.algorithm):
        return []
    size = max(stage.weights for stage in stages) / 1e9
    return [
        f"host memory: the reference policy, {size:.2f} GB for each rank, and as much again while it is used"
    ]


def _memory_row(number: int, stage: StageMemory, unit: float) -> tuple[str, ...]:
    sizes = (stage.weights, stage.gradients, stage.optimizer, stage.logits, stage.total)
    both = (stage.optimizer_distributed, stage.optimizer_plain)
    return str(number), f"{stage.parameters:,}", *(f"{size / unit:.2f}" for size in (*sizes, *both))


def _engine_memory(config: Config, hf_config: Any) -> str:
    rollout = config.rollout
    if rollout.engine == "native":
        return "the native engine's keys and values"
    if rollout.engine != "vllm":
        return "what the engines hold on GPUs of their own"
    head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    element = DTYPES[config.policy.precision].itemsize
    per_token = 2 * hf_config.num_hidden_layers * hf_config.num_key_value_heads * head * element
    weights = parameter_count(hf_config) * element / rollout.tensor_parallel / 1e9
    return (
        f"vLLM's share while it samples, rollout.gpu_memory_utilization={rollout.gpu_memory_utilization} of a GPU: "
        f"{weights:.3f} GB of weights, the rest keys and values at about "
        f"{per_token / rollout.tensor_parallel / 1e3:.1f} kB a token"
    )


def _batch_lines(config: Config, world_size: int) -> list[str]:
    rollout, policy, algorithm = config.rollout, config.policy, config.algorithm
    data_parallel = data_parallel_size(policy, world_size)
    responses = rollout.prompts_per_step * rollout.group_size
    per_update = algorithm.prompts_per_update * rollout.group_size
    per_rank = -(-per_update // data_parallel)
    multiple = sequence_multiple(policy.context_parallel)
    positions = rollout.max_prompt_tokens + rollout.max_response_tokens - 1
    longest = -(-positions // multiple) * multiple
    fitting = policy.micro_batch_tokens // longest
    micro_batches = -(-per_rank // fitting)
    group = micro_batch_multiple(policy)
    groups = f", in groups of {group}" if group > 1 else ""
    refills = f", at most {1 + rollout.max_refills} times with refills" if rollout.max_refills else ""
    context = policy.context_parallel
    part = (
        f", {policy.micro_batch_tokens // context} on each of {context} context ranks" if context > 1 else ""
    )
    return [
        "# batch arithmetic",
        f"a step       {rollout.prompts_per_step} prompts x {rollout.group_size} = {responses} responses{refills}",
        f"updates      {config.updates_per_rollout} a rollout = {rollout.prompts_per_step} / "
        f"{algorithm.prompts_per_update} prompts x {algorithm.epochs} (algorithm.epochs); {per_update} responses each",
        f"DP rank      {_share(rollout.prompts_per_step, data_parallel)} prompts a step; "
        f"{_share(per_update, data_parallel)} responses an update, balanced by tokens",
        f"sampling     {_sampling(config, world_size)}",
        f"micro-batch  at most {policy.micro_batch_tokens} tokens{part}; the longest sequence has {longest} positions, so "
        f"an update takes at most about {-(-micro_batches // group) * group}{groups}",
        f"the run      {config.trainer.max_steps} steps: {config.trainer.max_steps * responses:,} responses, "
        f"{config.trainer.max_steps * config.updates_per_rollout:,} updates",
    ]


def _sampling(config: Config, world_size: int) -> str:
    rollout, policy = config.rollout, config.policy
    if rollout.engine == "native":
        samplers = data_parallel_size(policy, world_size) * policy.context_parallel
        return f"by the policy itself on {samplers} DP x CP ranks, {_share(rollout.prompts_per_step, samplers)} prompts each"
    if rollout.engine != "vllm":
        return (
            f"by {rollout.engine} of {rollout.tensor_parallel} GPUs each, which are not among the ranks above"
        )
    engines = world_size // rollout.tensor_parallel
    return f"{engines} engines of {rollout.tensor_parallel} GPUs, {_share(rollout.prompts_per_step, engines)} prompts each"


def _share(total: int, parts: int) -> str:
    """What each part gets of a total: "4", or "4 or 5"."""
    return f"{total // parts}" if total % parts == 0 else f"{total // parts} or {total // parts + 1}"
