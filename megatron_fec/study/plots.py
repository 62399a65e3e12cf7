"""One PNG per experiment: a plot for each of its panels in each bed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from PIL import Image  # a dependency of matplotlib

from megatron_fec.study.exact import FAMILIES
from megatron_fec.study.experiments import FIG12, Experiment, Panel, reference_curve
from megatron_fec.study.quantities import (
    CLIP_FRACTION,
    ENTROPY,
    ENTROPY_CHANGE,
    PASS_AT,
    WHOLE,
    Curves,
    Points,
    cosine,
    smooth_near,
)
from megatron_fec.study.results import Runs
from megatron_fec.study.variants import BEDS

COLUMNS = 3
GREY = "#6b7280"
COLOURS = {
    "grpo": "#2563eb",
    "clip_higher": "#dc2626",
    "matched": "#9ca3af",
    "dynamic_upper": "#be185d",
    "dynamic_lower": "#4d7c0f",
    "id": "#059669",
    "did": "#d97706",
    "did_printed": "#78350f",
    "od": "#c4b5fd",
    "od_0.6": "#7c3aed",
    "static_id": "#6ee7b7",
    "static_did": "#fcd34d",
    "id_0.3": "#a7f3d0",
    "id_0.4": "#34d399",
    "id_0.6": "#064e3b",
    "target": "#111827",
    "target_hold": "#0891b2",
    "only_E1": "#dc2626",
    "only_E2": "#d97706",
    "only_E3": "#059669",
    "only_E4": "#7c3aed",
}
FAMILY_COLOURS = ("#2563eb", "#dc2626")
SCALED = {ENTROPY: "entropy", CLIP_FRACTION: "clip_fraction"}  # metric: its name in fig12.json
FamilyOfRuns = Mapping[str, Sequence[Curves]]  # variant -> its runs, one a seed


def draw(experiment: Experiment, runs: Runs) -> bytes | None:
    """The PNG; None where no panel has runs."""
    drawn = [
        (panel, bed, found)
        for panel in experiment.panels
        for bed in panel.beds
        if (found := _runs_of(panel, runs.get(bed, {})))
    ]
    if not drawn:
        return None
    columns = min(COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows), layout="constrained")
    for number, (panel, bed, found) in enumerate(drawn, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(f"{panel.title}\n{BEDS[bed].title}", fontsize=9)
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7, colors="#374151")
        DRAW[panel.kind](axes, panel, found)
        axes.legend(frameon=False, fontsize=6.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(128).save(
        small, format="png", optimize=True
    )  # a third of the size
    return small.getvalue()


def _runs_of(panel: Panel, seeds: Mapping[int, Mapping[str, Curves]]) -> dict[str, list[Curves]]:
    found = {v: [runs[v] for runs in seeds.values() if v in runs] for v in panel.variants}
    return {variant: curves for variant, curves in found.items() if curves}


def _curves(axes: Axes, panel: Panel, runs: FamilyOfRuns) -> None:
    """The mean over seeds; the band reaches from the lowest seed to the highest."""
    for variant, seeds in runs.items():
        points = [curves.points(panel.metric) for curves in seeds]
        steps = [share * seeds[0].total_steps for share, _ in points[0]]
        values = list(zip(*([value for _, value in seed] for seed in points), strict=True))
        colour = COLOURS[variant]
        axes.plot(steps, [sum(v) / len(v) for v in values], color=colour, linewidth=1.3, label=variant)
        if len(seeds) > 1:
            lowest, highest = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(steps, lowest, highest, color=colour, alpha=0.13, linewidth=0)
    axes.set_xlabel("step", fontsize=7)


def _target(axes: Axes, panel: Panel, runs: FamilyOfRuns) -> None:
    """Curves, and the target as a dashed line from the mean first entropy."""
    _curves(axes, panel, runs)
    for variant, end in (("target", 0.5), ("target_hold", 1.0)):
        if variant in runs:
            seeds = runs[variant]
            start = sum(curves.points(panel.metric)[0][1] for curves in seeds) / len(seeds)
            shares = [share for share, _ in seeds[0].points(panel.metric)]
            steps = [share * seeds[0].total_steps for share in shares]
            axes.plot(
                steps, [start * cosine(share, end) for share in shares], "--", color="black", linewidth=1
            )


def _shapes(axes: Axes, panel: Panel, runs: FamilyOfRuns) -> None:
    """Ours, smoothed and averaged over seeds, and the digitised curve; each over its own range."""
    for variant, seeds in runs.items():
        colour = COLOURS[variant]
        shares = [share for share, _ in seeds[0].points(panel.metric)]
        smooth = [[smooth_near(curves.points(panel.metric), x, 0.02) for x in shares] for curves in seeds]
        ours = list(zip(shares, (sum(v) / len(v) for v in zip(*smooth, strict=True)), strict=True))
        axes.plot(*_scaled(ours), color=colour, linewidth=1.3, label=variant)
        reference = reference_curve(variant, SCALED[panel.metric])
        label = f"{variant}, Fig. 12 (T = {FIG12['plan_steps'][variant]})"
        axes.plot(*_scaled(reference), "--", color=colour, linewidth=1, alpha=0.7, label=label)
    axes.set_xlabel("share of the plan", fontsize=7)


def _scaled(points: Points) -> tuple[list[float], list[float]]:
    values = [value for _, value in points]
    low, high = min(values), max(values)
    return [share for share, _ in points], [(value - low) / ((high - low) or 1.0) for value in values]


def _pass_at_k(axes: Axes, panel: Panel, runs: FamilyOfRuns) -> None:
    """pass@k over k, at the evaluation nearest to half of the plan."""
    for variant, seeds in runs.items():
        ks = seeds[0].keys(PASS_AT)
        middle = [
            [min(c.points(f"{PASS_AT}{k}"), key=lambda point: abs(point[0] - 0.5))[1] for c in seeds]
            for k in ks
        ]
        means = [sum(values) / len(values) for values in middle]
        axes.plot(ks, means, "o-", color=COLOURS[variant], linewidth=1.2, markersize=3, label=variant)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("k", fontsize=7)


def _regions(axes: Axes, panel: Panel, runs: FamilyOfRuns) -> None:
    """Entropy change of a region's variant less that of its base, in 1e-3 nats; a dot is a seed."""
    names = [name for name in runs if name.startswith(panel.metric)]
    for shift, family, colour in zip((-0.2, 0.2), FAMILIES, FAMILY_COLOURS, strict=True):
        for place, name in enumerate(names):
            region = name.removeprefix(f"{panel.metric}_")
            closed = "closed_upper" if region < "E3" else "closed_lower"
            base = runs[closed if panel.metric == "only" else "grpo"]
            margins = [
                1e3 * (a.mean(ENTROPY_CHANGE + family, WHOLE) - b.mean(ENTROPY_CHANGE + family, WHOLE))
                for a, b in zip(runs[name], base, strict=True)
            ]
            label = f"{family} states" if place == 0 else None
            axes.bar(place + shift, sum(margins) / len(margins), 0.36, color=colour, alpha=0.6, label=label)
            axes.plot([place + shift] * len(margins), margins, "o", color=colour, markersize=2.5)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.removeprefix(f"{panel.metric}_") for name in names])
    axes.set_ylabel("1e-3 nats", fontsize=7)


DRAW: dict[str, Callable[[Axes, Panel, FamilyOfRuns], None]] = {
    "curves": _curves,
    "target": _target,
    "shapes": _shapes,
    "pass_at_k": _pass_at_k,
    "regions": _regions,
}
