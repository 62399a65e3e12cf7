"""What a replay leaves behind: a table in the terminal, replay.json with every number, replay.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from megatron_fec.dump_reader import some_of
from megatron_fec.replay import CLASSES, Replay
from megatron_fec.report import COLOURS, STYLES
from megatron_fec.rollout_dump import SCHEMA_VERSION

ROWS = (  # heading, metric, scale
    ("clipped, A > 0, %", "cut_positive", 100),
    ("clipped, A < 0, %", "cut_negative", 100),
    ("kept, %", "kept", 100),
    ("dH predicted", "dH/predicted", 1),
    ("dH without clipping", "dH/unclipped", 1),
    ("dH measured", "dH/measured", 1),
    ("loss", "loss", 1),
    ("gradient norm", "grad_norm/all", 1),
    *((f"gradient norm, {name}", f"grad_norm/{name}", 1) for name in CLASSES),
)
GREY = "#374151"


def write_replay(replay: Replay, folder: Path) -> None:
    """Writes replay.json and replay.png to the folder, and prints the table, what was skipped and where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(replay, folder / "replay.json")
    save_plot(replay, folder / "replay.png")
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe: as wide as it needs
        console = Console(highlight=False, width=24 + 26 * len(replay.results))
    console.print(comparison_table(replay))
    if replay.faults:
        print(f"skipped {len(replay.faults)} corrupt rows or files: {some_of(replay.faults)}")
    print(f"replay      {folder / 'replay.json'}, {folder / 'replay.png'}")


def comparison_table(replay: Replay) -> Table:
    """One column a strategy."""
    table = Table(
        title=f"{replay.tokens} tokens of {len(replay.steps)} step(s)",
        caption="means over response tokens; dH in nats, of a step of unit size along each token's own loss",
    )
    columns = [result.metrics() for result in replay.results]
    table.add_column("")
    for result in replay.results:
        table.add_column(result.strategy.label, justify="right", overflow="fold")
    for heading, name, scale in ROWS:
        if name in columns[0]:
            table.add_row(heading, *(f"{metrics[name] * scale:.4g}" for metrics in columns))
    return table


def write_json(replay: Replay, path: Path) -> None:
    """Every number; what JSON does not know becomes null."""
    content = {
        "dump": str(replay.dump),
        "schema_version": SCHEMA_VERSION,
        "settings": asdict(replay.settings),
        "steps": replay.steps,
        "tokens": replay.tokens,
        "faults": replay.faults,
        "strategies": [
            asdict(result.strategy) | {"metrics": result.metrics(), "updates": result.updates}
            for result in replay.results
        ],
    }
    path.write_text(json.dumps(_clean(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def save_plot(replay: Replay, path: Path) -> None:
    """Clipped share and predicted dH by update, predicted dH and gradient norm by class of tokens."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (shares, changes), (classes, norms) = figure.subplots(2, 2)
    columns = [result.metrics() for result in replay.results]
    for index, result in enumerate(replay.results):
        rows = result.updates
        at = range(len(rows))
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": STYLES[index % len(STYLES)],
            "marker": "o" if len(rows) <= 40 else None,
            "markersize": 3,
        }
        shares.plot(at, [100 * row["cut_positive"] for row in rows], **style, label=result.strategy.label)
        shares.plot(at, [-100 * row["cut_negative"] for row in rows], **style)
        changes.plot(at, [row["dH/predicted"] for row in rows], **style)
    _bars(classes, [[m[f"dH/region_{name}"] for name in CLASSES] for m in columns])
    _bars(norms, [[m[f"grad_norm/{name}"] for name in CLASSES] for m in columns])
    _decorate(
        shares, "Clipped, % of tokens: A > 0 upwards, A < 0 downwards", "update, in the order of training"
    )
    _decorate(changes, "Predicted dH of each update, nats a token", "update, in the order of training")
    for axes in (shares, changes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _decorate(classes, "Predicted dH by class of tokens; the parts add up", "class")
    _decorate(norms, "Gradient norm over the logits by class; the squares add up", "class")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(axes: Axes, groups: Sequence[Sequence[float]]) -> None:
    """One group a class, one bar a strategy."""
    width = 0.8 / len(groups)
    for index, values in enumerate(groups):
        places = [place - 0.4 + (index + 0.5) * width for place in range(len(values))]
        axes.bar(places, values, width=width, color=COLOURS[index % len(COLOURS)])
    axes.set_xticks(range(len(CLASSES)), CLASSES)


def _decorate(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=9, color="#111827")
    axes.set_xlabel(label, fontsize=8, color=GREY)
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=GREY)


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
