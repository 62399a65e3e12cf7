"""What a checkpoint holds: Megatron's distributed format for model and optimizer, the trainer's state, RNGs by rank.

Here it is collected and read back; checkpoint_save.py writes it. Megatron's part is read through pickle (.metadata),
which can run any code: read_trainer_state, which comes before every load, refuses what a stranger can have written.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.parallel_state import get_data_parallel_group

from megatron_fec.config import ConfigError
from megatron_fec.policy.checkpoint_files import STATE_FILE
from megatron_fec.policy.step import Policy, cores, gather_weights
from megatron_fec.security import check_checkpoint

# The sizes that a checkpoint's tensors must share with the model that reads them.
MODEL_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
EXPERT_SIZES = ("num_experts", "moe_intermediate_size")  # where the model has experts


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """What the trainer needs beside the weights to go on as if it had never stopped."""

    step: int  # steps finished
    consumed_samples: int  # prompts taken from the order
    weight_version: int
    schedule: dict[str, Any]  # the schedule's state_dict, with OD's mode and H_init
    strategies: dict[str, Any] = field(
        default_factory=dict
    )  # state of the loss and of the advantages, if any
    skipped_updates: int = 0  # in the whole run, by trainer.on_nonfinite=skip
    skips_in_a_row: int = 0  # up to now
    unwritten: dict[str, float] = field(
        default_factory=dict
    )  # metrics of the last step, if a stop put off its validation


def read_trainer_state(checkpoint: Path, *, hf_config: Any, distributed_optimizer: bool) -> TrainerState:
    """The trainer's state, after checking that it belongs to this model; needs no process group."""
    check_checkpoint(checkpoint)
    path = checkpoint / STATE_FILE
    try:
        saved = json.loads(path.read_text())
        state = TrainerState(**saved["trainer"])
        model, saved_kind = saved["model"], saved["distributed_optimizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"trainer.resume: {path} is not readable ({error}). Remove that folder to resume from the one before it."
        ) from error
    for name, value in model.items():
        if getattr(hf_config, name) != value:
            raise ConfigError(
                f"trainer.resume: the checkpoint {checkpoint} is of another model, its {name} is {value} and that of "
                f"model.path is {getattr(hf_config, name)}. Use another trainer.run_dir or trainer.resume=never."
            )
    if saved_kind != distributed_optimizer:
        raise ConfigError(
            f"policy.distributed_optimizer={distributed_optimizer} cannot read the optimizer state of {checkpoint}, "
            f"which was saved with {saved_kind}. Set it to that value."
        )
    return state


def load_checkpoint(policy: Policy, checkpoint: Path) -> None:
    """Fills model, optimizer, the schedule's step and this rank's RNGs; the layout may differ from the saving one."""
    _allocate_torch_adam(policy)
    wanted = sharded_state(policy, is_loading=True)
    settings = [_settings(group) for group in policy.optimizer.param_groups]
    loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(checkpoint))  # type: ignore[assignment]
    _fill_models(policy, loaded)
    saved = loaded["optimizer"]
    for part in saved.values() if 0 in saved else [saved]:  # a mixture of experts has two optimizers
        for group in part.get("optimizer", part)["param_groups"]:
            group["max_lr"] = settings[0]["max_lr"]  # by which megatron-core 0.19 finds the group
    with _torch_adam_step():
        policy.optimizer.load_state_dict(saved)
    _separate_torch_adam_steps(policy)
    # Rates and the length of the run are those of the configuration, which may have changed since the save.
    for group, own in zip(policy.optimizer.param_groups, settings, strict=True):
        group.update(own)
    policy.scheduler.num_steps = loaded["scheduler"]["num_steps"]
    policy.scheduler.step(increment=0)
    rng_file = checkpoint / f"rng_{dist.get_rank():05d}.pt"
    if (
        rng_file.is_file()
    ):  # a larger world has ranks of which none was saved; their streams are derived from seeds
        load_rng_state(torch.load(rng_file, weights_only=True))


def load_model_only(policy: Policy, checkpoint: Path) -> None:
    """Fills the model and nothing else, in any layout."""
    wanted = _sharded_models(policy, _sharding_metadata())
    loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(checkpoint))  # type: ignore[assignment]
    _fill_models(policy, loaded)


def _sharded_models(policy: Policy, metadata: dict[str, Any]) -> dict[str, Any]:
    """The shards of each chunk under a name of its own; a tensor's name in the file does not depend on the layout."""
    return {
        f"model{number}": core.sharded_state_dict(metadata=metadata)
        for number, core in enumerate(cores(policy))
    }


def _fill_models(policy: Policy, loaded: dict[str, Any]) -> None:
    for number, core in enumerate(cores(policy)):
        core.load_state_dict(loaded[f"model{number}"])


def _sharding_metadata() -> dict[str, Any]:
    # "fully_reshardable" is the one format of the distributed optimizer that other layouts can read.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": get_data_parallel_group(with_context_parallel=True),
    }


def sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    """Megatron's part: this rank's shards of model and optimizer, and the step of the learning rate."""
    metadata = _sharding_metadata()
    gather_weights(policy)
    models = _sharded_models(policy, metadata)
    with _places_with_padding():
        optimizer = policy.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": without_classes(optimizer), "scheduler": policy.scheduler.state_dict()}


def without_classes(state: Any) -> Any:
    """The optimizer's state without the classes that its parameter groups name where it lies on the host.

    They are settings, which load_checkpoint takes from the configuration; a newer version may not have them any more.
    """
    if isinstance(state, dict):
        return {name: without_classes(value) for name, value in state.items() if not isinstance(value, type)}
    return [without_classes(value) for value in state] if isinstance(state, list) else state


def is_distributed(policy: Policy) -> bool:
    return policy.chunks[0].ddp_config.use_distributed_optimizer


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What the configuration says of a parameter group, and not what training made of it."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _torch_adams(policy: Policy) -> list[torch.optim.Adam]:
    """The inner optimizers of Megatron's distributed ones, where neither Transformer Engine nor Apex gave another."""
    chained = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    inner = [outer.optimizer for outer in chained if isinstance(outer, DistributedOptimizer)]
    return [optimizer for optimizer in inner if isinstance(optimizer, torch.optim.Adam)]


def _allocate_torch_adam(policy: Policy) -> None:
    """Gives torch's Adam an empty state: the distributed optimizer reads its "step" before it has loaded one."""
    for inner in _torch_adams(policy):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[parameter] = moments | {"step": torch.zeros(())}


def _separate_torch_adam_steps(policy: Policy) -> None:
    """megatron-core gives all parameters one "step" tensor, which every one of them would then count up."""
    for inner in _torch_adams(policy):
        for state in inner.state.values():
            state["step"] = state["step"].clone()


@contextmanager
def _torch_adam_step() -> Iterator[None]:
    """megatron-core copies every key of the optimizer state, and torch's Adam has "step", which is not a shard.

    The step stands in the parameter groups that load_state_dict has just filled.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(
        self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, Any]
    ) -> None:
        index, order = self.model_param_group_index_map[model_param]
        group = self.optimizer.param_groups[index]
        if "step" in self.optimizer.state[group["params"][order]]:
            tensors = tensors | {"step": torch.as_tensor(group["step"])}
        original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = original


@contextmanager
def _places_with_padding() -> Iterator[None]:
    """megatron-core gathers the optimizer's state without the padding between buckets, and then cuts it as if it were there.

    With overlap there are several buckets: wherever one of them is padded, all weights behind it would be saved shifted.
    """
    original = DistributedOptimizer.get_parameter_state_dp_zero

    def with_padding(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> Any:
        state: Any = original(self, *args, **kwargs)
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values() if state is not None else ():
                for name, packed in tensors.items():
                    if isinstance(packed, torch.Tensor):
                        tensors[name] = _with_padding(packed, buffer)
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = with_padding
    try:
        yield
    finally:
        DistributedOptimizer.get_parameter_state_dp_zero = original


def _with_padding(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """[numel] the state of a buffer's weights where the weights lie, from [numel_unpadded] of its buckets end to end."""
    placed, start = packed.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        placed[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start:end]
        start = end
    return placed


def _rng_tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()


def rng_state() -> dict[str, Any]:
    """Every random state of this rank, as types that torch.load reads with weights_only."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": _rng_tracker().get_states(),
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def load_rng_state(state: dict[str, Any]) -> None:
    """Goes back to what rng_state returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    _rng_tracker().set_states(state["megatron"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
