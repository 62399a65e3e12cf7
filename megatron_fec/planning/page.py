"""A plan as text: tables in a terminal, plain columns in a file or a pipe."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from megatron_fec.planning import assumptions
from megatron_fec.planning.layouts import Layout, name_of
from megatron_fec.planning.lengths import Lengths
from megatron_fec.planning.limits import Scale, first_limit
from megatron_fec.planning.memory import PARTS
from megatron_fec.planning.plan import Model, Plan
from megatron_fec.policy.sizes import data_parallel_size

WIDTH = 200  # of a file or a pipe: tables are not folded there
SHOWN_LAYOUTS = 8
SHOWN_REASONS = 8


def print_plan(
    plan: Plan,
    model: Model,
    lengths: Lengths,
    layouts: Sequence[Layout],
    scales: Sequence[Scale],
    *,
    price: float,
    source: str,
    shows_all: bool,
    console: Console | None = None,
) -> None:
    """source: where the checkpoint's sizes came from. price: dollars of a GPU hour."""
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)

    def say(text: str = "") -> None:
        console.print(text, markup=False, soft_wrap=True)

    machine, policy = plan.machine, plan.config.policy
    shape = model.shape
    say(
        f"{plan.config.model.path}, {shape.parameters / 1e9:.2f} B parameters ({source}), on {machine.nodes} "
        f"node{'s'[: machine.nodes - 1]} x "
        f"{machine.gpus_per_node} {machine.gpu.name}: {name_of(policy)}, "
        f"DP {data_parallel_size(policy, machine.world_size)}, {policy.precision}"
    )
    say("PLANNED, not measured: docs/planning.md has the formulas and every assumption.")
    say()
    say(f"memory of the fullest GPU by phase, GB (1e9 bytes) of {machine.gpu.memory / 1e9:.0f}")
    console.print(_memory_table(plan))
    for name, size in plan.memory.host.items():
        say(f"host memory of a node: {name} {size / 1e9:.0f} GB")
    say()
    say(
        f"time of a step, responses of {lengths.mean:.0f} tokens on average and {lengths.longest:.0f} at most, "
        f"prompts of {lengths.prompt:.0f}"
    )
    console.print(_time_table(plan))
    _say_rates(say, plan, price)
    say()
    say("verdict: fits" if plan.fits else "verdict: DOES NOT FIT")
    for obstacle in plan.obstacles:
        say(f"  {obstacle}")
    say()
    _say_layouts(console, layouts, shows_all=shows_all)
    say()
    say("the configuration's layout on more nodes")
    console.print(_scale_table(scales))
    say(f"what limits: {first_limit(list(scales))}")


def _table(*headings: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right", no_wrap=number < left)
    return table


def _memory_table(plan: Plan) -> Table:
    used = [part for part in PARTS if any(phase.get(part) for phase in plan.memory.phases.values())]
    table = _table("phase", *used, "sum", "free")
    for name, parts in plan.memory.phases.items():
        total = plan.memory.total(name)
        cells = [f"{parts[part] / 1e9:.1f}" if part in parts else "-" for part in used]
        table.add_row(name, *cells, f"{total / 1e9:.1f}", f"{(plan.machine.gpu.memory - total) / 1e9:.1f}")
    return table


def _time_table(plan: Plan) -> Table:
    time, updates = plan.time, plan.config.updates_per_rollout
    sampling, update = time.sampling, time.update
    notes = {
        "rollout": f"prefill {sampling.prefill:.1f}, decode {sampling.decode:.1f}, of which the last tenth of the "
        f"sequences {sampling.tail:.1f}; {sampling.sequences:.0f} sequences an engine, {sampling.at_a_time:.0f} at a time",
        "training": f"{updates} updates of {time.micro_batches} micro-batches: products {updates * update.products:.1f}, "
        f"collectives {updates * update.tensor:.1f}, bubble {updates * update.bubble:.1f}, gradients and weights over "
        f"DP {updates * time.reduction:.1f}",
        "checkpoint": f"one every {plan.config.trainer.save_every} steps, its share of each",
        "offload": f"policy.options.offload={plan.config.policy.options.get('offload', 'none')}",
    }
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    for name, seconds in time.parts.items():
        if seconds:
            table.add_row(name, f"{seconds:.1f}", f"{seconds / time.total:.0%}", notes.get(name, ""))
    ahead = "the next step is sampled while this one trains" if time.is_ahead else ""
    table.add_row("step", f"{time.total:.1f}", "", ahead)
    return table


def _say_rates(say: Callable[[str], None], plan: Plan, price: float) -> None:
    time, gpu = plan.time, plan.machine.gpu
    peak, gpus = gpu.peak(plan.config.policy.precision), plan.machine.world_size
    steps = assumptions.HOURS_OF_STEPS
    hours = time.gpu_hours(steps)
    say(
        f"{time.tokens_per_second:,.0f} response tokens/s; MFU {time.mfu(peak, gpus=gpus, whole_step=False):.0%} of "
        f"training, {time.mfu(peak, gpus=gpus, whole_step=True):.0%} of the whole step"
    )
    say(
        f"{steps} steps: {time.total * steps / 3600:.1f} hours, {hours:,.0f} GPU hours, ${hours * price:,.0f} at "
        f"${price:g} a GPU hour (--price)"
    )


def _say_layouts(console: Console, layouts: Sequence[Layout], *, shows_all: bool) -> None:
    fitting = [layout for layout in layouts if layout.plan is not None and not layout.reason]
    best: dict[str, Layout] = {}
    for layout in fitting:  # by time: the first recompute mode of a layout is its best
        best.setdefault(layout.name.rsplit(" ", 1)[0], layout)
    rows = fitting if shows_all else list(best.values())[:SHOWN_LAYOUTS]
    console.print(
        f"layouts: {len(fitting)} of {len(layouts)} fit, fastest first"
        + ("" if shows_all else " (the best recompute mode of each; --all shows every one)"),
        markup=False,
    )
    table = _table("layout", "GB", "fullest phase", "seconds a step")
    for layout in rows:
        assert layout.plan is not None
        memory = layout.plan.memory
        table.add_row(
            layout.name,
            f"{layout.plan.fullest_bytes / 1e9:.1f}",
            memory.fullest,
            f"{layout.plan.time.total:.1f}",
        )
    console.print(table)
    refused = [layout for layout in layouts if layout.reason]
    if shows_all:
        for layout in refused:
            console.print(f"  {layout.name}: {layout.reason}", markup=False, soft_wrap=True)
        return
    for line in reasons(refused):
        console.print(line, markup=False, soft_wrap=True)


def reasons(refused: Sequence[Layout]) -> list[str]:
    """Why layouts do not fit: how many of each reason, the most frequent first; memory by phase, with the least excess."""
    groups: Counter[str] = Counter()
    least: dict[str, tuple[float, Layout]] = {}
    names: dict[str, list[str]] = defaultdict(list)
    for layout in refused:
        if layout.plan is not None:
            memory = layout.plan.memory
            excess = layout.plan.fullest_bytes - layout.plan.machine.gpu.memory
            key = f"memory, {memory.fullest}" if excess > 0 else layout.reason
            if key not in least or excess < least[key][0]:
                least[key] = (excess, layout)
        else:
            key = re.sub(r"\b\d+\b", "N", layout.reason.split(". ")[0])
        groups[key] += 1
        names[key].append(layout.name)
    lines = []
    for key, count in groups.most_common(SHOWN_REASONS):
        if key in least and least[key][0] > 0:
            excess, layout = least[key]
            lines.append(f"  {count} do not fit: {key}; the nearest, {layout.name}, by {excess / 1e9:.1f} GB")
        else:
            lines.append(f"  {count} do not fit: {key} (such as {names[key][0]})")
    rest = len(groups) - SHOWN_REASONS
    return lines + ([f"  and {rest} more reasons (--all)"] if rest > 0 else [])


def _scale_table(scales: Sequence[Scale]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("nodes", "GPUs", "seconds a step", "speed-up"):
        table.add_column(heading, justify="right")
    table.add_column("largest part that hardly shrinks, or what is in the way")
    for row in scales:
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        speedup = "-" if row.speedup is None else f"{row.speedup:.1f}"
        table.add_row(str(row.nodes), str(row.gpus), seconds, speedup, row.limit)
    return table
