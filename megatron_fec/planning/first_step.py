"""The first step of a run beside its plan, on a GPU that the planner knows; on others nothing is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fec.config import Config
from megatron_fec.planning import assumptions
from megatron_fec.planning.activations import Layers
from megatron_fec.planning.gpus import gpu_of_device
from megatron_fec.planning.plan import Machine, Model, Plan, lengths_of, make_plan
from megatron_fec.planning.shape import shape_of

GIB = float(1 << 30)
RESPONSE_LENGTH = "train_rollouts/response_length"
TIMERS = {  # part of the plan -> timer
    "rollout": "generate",
    "refit": "refit",
    "log-probs": "logprobs",
    "training": "train",
    "offload": "offload",
    "step": "step",
}
PEAKS = {  # phase of the plan -> part of memory/reserved_gib
    "sampling": "generate",
    "refit": "refit",
    "log-probs": "logprobs",
    "training": "train",
}


@dataclass(slots=True, kw_only=True)
class FirstStep:
    """Called with each step's row: lines for the first that was timed, if the planner knows the GPU, then None."""

    config: Config
    hf_config: Any
    device_name: str  # of torch.cuda.get_device_name
    world_size: int
    gpus_per_node: int
    layers: Layers
    is_over: bool = False

    def __call__(self, row: Mapping[str, float]) -> str | None:
        """The metrics beside a plan for responses as long as they were."""
        gpu = gpu_of_device(self.device_name)
        if self.is_over or gpu is None or "timers/step" not in row:
            return None
        self.is_over = True
        nodes = -(-self.world_size // self.gpus_per_node)
        machine = Machine(gpu=gpu, nodes=nodes, gpus_per_node=min(self.gpus_per_node, self.world_size))
        model = Model(hf_config=self.hf_config, shape=shape_of(self.hf_config))
        mean = min(max(1.0, row[RESPONSE_LENGTH]), self.config.rollout.max_response_tokens)
        lengths = lengths_of(self.config, mean)
        return "\n".join(compare(make_plan(self.config, model, machine, lengths, layers=self.layers), row))


def no_note(row: Mapping[str, float]) -> str | None:
    """Of a run without a plan."""


def compare(plan: Plan, row: Mapping[str, float]) -> list[str]:
    """planned and measured seconds by part, and memory by phase where the row has it.

    Measured memory is what torch reserves, without CUDA's context and NCCL's buffers: the plan's are taken off.
    """
    lines = [
        f"first step, warm-up included, beside its plan for {plan.machine.gpu.name}: planned, measured, ratio"
    ]
    seconds = plan.time.parts | {"step": _per_step(plan)}
    for part, timer in TIMERS.items():
        if (measured := row.get(f"timers/{timer}")) is not None and seconds[part]:
            lines.append(_line(part, seconds[part], measured, "s"))
    for phase, part in PEAKS.items():
        if (measured := row.get(f"memory/reserved_gib/{part}")) is not None:
            planned = plan.memory.total(phase) - assumptions.CONTEXT
            lines.append(_line(f"memory, {phase}", planned / GIB, measured, "GiB"))
    return lines


def _per_step(plan: Plan) -> float:
    """A step by its timer, which a save does not belong to."""
    return plan.time.total - plan.time.parts["checkpoint"]


def _line(name: str, planned: float, measured: float, unit: str) -> str:
    ratio = f"{measured / planned:.2f}" if planned else "-"
    return f"  {name:<18} {planned:9.1f} {unit}  {measured:9.1f} {unit}  x {ratio}"
