"""What keeps more nodes from making a step shorter: the parts of a step that do not shrink, and where updates starve."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_fec.config import Config, ConfigError
from megatron_fec.planning.lengths import Lengths
from megatron_fec.planning.plan import Machine, Model, Plan, check_layout, make_plan, starving
from megatron_fec.policy.sizes import data_parallel_size

MOST_NODES = 1024
POOR_DOUBLING = 1.5  # twice the nodes that make a step less than this much faster are said to be limited


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The configuration's layout on a number of nodes; seconds is None where it cannot run."""

    nodes: int
    gpus: int
    seconds: float | None
    speedup: float | None  # over the smallest number of nodes that fits
    limit: str


def limits(plan: Plan, lengths: Lengths) -> dict[str, float]:
    """Seconds of a step that more data-parallel nodes do not shorten, by cause."""
    time, config = plan.time, plan.config
    updates = config.updates_per_rollout
    sequences = config.algorithm.prompts_per_update * config.rollout.group_size
    ranks = data_parallel_size(config.policy, plan.machine.world_size)
    mean = sequences / ranks * lengths.sequence
    fullest = max(mean, lengths.expected_longest(sequences) - 1)
    return {
        "decode tail: few long responses": time.sampling.tail,
        "decode steps: each response is sampled token by token": time.sampling.decode - time.sampling.tail
        if time.sampling.sequences <= 1.5 * time.sampling.at_a_time
        else 0.0,
        "one long sequence in an update keeps the other ranks waiting": updates
        * time.update.products
        * (1 - mean / fullest),
        "pipeline bubble: few micro-batches in an update": updates * time.update.bubble,
        "gradients and weights between nodes": updates * time.reduction,
        "refit": time.parts["refit"],
        "checkpoint": time.parts["checkpoint"],
    }


def scaling(config: Config, model: Model, machine: Machine, lengths: Lengths) -> list[Scale]:
    """The same configuration on 1, 2, 4, ... nodes, as far as it can run, and the first on which it cannot."""
    rows: list[Scale] = []
    first: float | None = None
    nodes = 1
    while nodes <= max(MOST_NODES, machine.nodes):
        here = Machine(gpu=machine.gpu, nodes=nodes, gpus_per_node=machine.gpus_per_node)
        row, is_end = _scale(config, model, here, lengths, first)
        first = first or row.seconds
        rows.append(row)
        if is_end:
            break
        nodes *= 2
    return rows


def first_limit(rows: list[Scale]) -> str:
    """One sentence about the first number of nodes that is limited."""
    able = [row for row in rows if row.seconds is not None]
    for before, after in pairwise(able):
        assert before.seconds is not None and after.seconds is not None
        gain = before.seconds / after.seconds
        if gain < POOR_DOUBLING:
            return (
                f"from {before.nodes} to {after.nodes} nodes a step becomes only {gain:.2f} times as fast. "
                f"First limit: {after.limit}"
            )
    if rows and rows[-1].seconds is None:
        return f"first limit, at {rows[-1].nodes} nodes: {rows[-1].limit}"
    return "none up to here"


def _scale(
    config: Config, model: Model, machine: Machine, lengths: Lengths, first: float | None
) -> tuple[Scale, bool]:
    """A row, and whether larger numbers cannot run either."""
    nodes, gpus = machine.nodes, machine.world_size
    reason = None
    try:
        check_layout(config, model.hf_config, world_size=gpus)
    except ConfigError:
        reason = "the layout does not divide these GPUs"
    if reason is not None:
        return Scale(nodes=nodes, gpus=gpus, seconds=None, speedup=None, limit=reason), False
    if starving(config, world_size=gpus):
        sequences = config.algorithm.prompts_per_update * config.rollout.group_size
        ranks = data_parallel_size(config.policy, gpus)
        reason = (
            f"an update's {sequences} sequences (algorithm.prompts_per_update x rollout.group_size) do not feed "
            f"{ranks} data-parallel ranks"
        )
        return Scale(nodes=nodes, gpus=gpus, seconds=None, speedup=None, limit=reason), True
    plan = make_plan(config, model, machine, lengths)
    if not plan.fits:
        return Scale(nodes=nodes, gpus=gpus, seconds=None, speedup=None, limit=plan.obstacles[0]), False
    causes = limits(plan, lengths)
    worst = max(causes, key=lambda cause: causes[cause])
    seconds = plan.time.total
    limit = f"{worst} ({causes[worst]:.1f} s)"
    speedup = (first or seconds) / seconds
    return Scale(nodes=nodes, gpus=gpus, seconds=seconds, speedup=speedup, limit=limit), False
