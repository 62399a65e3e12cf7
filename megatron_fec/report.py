"""One self-contained HTML page about one or more runs: what differs between them, numbers, and curves.

Reads config.yaml and metrics.jsonl of each run folder, so it works on a run that is still going.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig, OmegaConf

from megatron_fec.report_panels import PANELS, Curve, Panel
from megatron_fec.run_log import Row, format_value, keys_under, read_rows, summary_rows

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
STYLES = ("-", "--", ":", "-.")
SMOOTH_FROM = 40  # rows; longer runs show a moving average over the raw curve
NOT_STACKED = "timers/step"  # the whole, of which the other timers are parts
HEADLINE_KEYS = (  # of the table of settings, where runs may agree
    "model.path",
    "data.train",
    "algorithm.schedule.name",
    "algorithm.schedule.total_steps",
    "trainer.max_steps",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    label: str  # unique among the runs of a report
    folder: Path
    rows: list[Row]
    settings: dict[str, Any]  # dotted key -> value; empty without a config.yaml


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Writes the page about the runs to `output`; it needs no other file and no network."""
    runs = _load_runs(run_dirs)
    title = " and ".join(run.label for run in runs)
    parts = [_header(title, runs), _settings_table(runs), _summary_tables(runs)]
    cards = [card for panel in PANELS if (card := _panel_card(panel, runs))]
    cards += [card for run in runs if (card := _timers_card(run, len(runs)))]
    parts.append(f'<div class="grid">{"".join(cards)}</div>')
    page = _PAGE.replace("@TITLE@", html.escape(title)).replace("@BODY@", "\n".join(parts))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(output)


def _load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    if not run_dirs:
        raise ValueError("report needs at least one run folder, such as runs/quickstart.")
    runs: list[Run] = []
    for folder in run_dirs:
        metrics = folder / "metrics.jsonl"
        if not metrics.is_file():
            raise ValueError(
                f"{folder} is not a run folder: it holds no metrics.jsonl. Give the run_dir of a run."
            )
        config = folder / "config.yaml"
        settings = _flat(OmegaConf.load(config)) if config.is_file() else {}
        label = folder.resolve().name
        if "algorithm.schedule.name" in settings:
            label += f" ({settings['algorithm.schedule.name']})"
        if label in {run.label for run in runs}:
            label = f"{folder} {label}"
        runs.append(Run(label=label, folder=folder, rows=read_rows(metrics), settings=settings))
    return runs


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a nested configuration."""
    if not isinstance(node, DictConfig):
        return {prefix.removesuffix("."): node}
    return {k: v for key in node for k, v in _flat(node[key], f"{prefix}{key}.").items()}


def _header(title: str, runs: Sequence[Run]) -> str:
    lines = []
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        if run.rows:
            done = int(run.rows[-1]["step"]) + 1
            total = run.settings.get("trainer.max_steps")
            state = (
                f"{done} steps" if total is None or done >= total else f"unfinished: {done} of {total} steps"
            )
        else:
            state = "no step is finished yet, so there is nothing to draw"
        dot = f'<span class="dot" style="background:{colour}"></span>'
        lines.append(
            f"<li>{dot}<b>{html.escape(run.label)}</b> - {state} - {html.escape(str(run.folder))}</li>"
        )
    return f'<h1>{html.escape(title)}</h1><ul class="runs">{"".join(lines)}</ul>'


def _settings_table(runs: Sequence[Run]) -> str:
    """What the runs are, and every setting in which they differ; their folders differ anyway."""
    keys = sorted({key for run in runs for key in run.settings} - {"trainer.run_dir"})
    differing = [key for key in keys if len({str(run.settings.get(key)) for run in runs}) > 1]
    shown = [key for key in HEADLINE_KEYS if key in keys and key not in differing]
    if not shown and not differing:
        return ""
    rows = [[key, *(str(run.settings.get(key)) for run in runs)] for key in shown + differing]
    heading = "Settings" if len(runs) == 1 else f"Settings: {len(differing)} differ"
    everything = _table(
        ["", *(r.label for r in runs)], [[k, *(str(r.settings.get(k)) for r in runs)] for k in keys]
    )
    return (
        f"<h2>{heading}</h2>{_table(['', *(run.label for run in runs)], rows, marked=differing)}"
        f"<details><summary>all settings</summary>{everything}</details>"
    )


def _summary_tables(runs: Sequence[Run]) -> str:
    names: list[str] = []
    found = [dict(summary_rows(run.rows)) for run in runs]
    for values in found:
        names += [name for name in values if name not in names]
    if not names:
        return ""
    many = len(runs) > 1
    columns = [
        f"{run.label}: {when}" if many else when for run in runs for when in ("start", "middle", "end")
    ]
    rows = []
    for name in names:
        cells = [values.get(name) for values in found]
        rows.append(
            [name, *(text for cell in cells for text in (map(format_value, cell) if cell else ("-",) * 3))]
        )
    note = '<p class="note">Means over the first, central and last tenth of the steps.</p>'
    return f"<h2>Start, middle, end</h2>{_table(['', *columns], rows)}{note}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in row)
        body += f'<tr class="marked">{cells}</tr>' if row[0] in marked else f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _panel_card(panel: Panel, runs: Sequence[Run]) -> str:
    """The card of one panel; empty where no run has what it is about, its first curve."""
    if not any(_expand(panel.curves[0], run.rows) for run in runs):
        return ""
    figure, axes = _new_figure()
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        curves = [c for curve in panel.curves for c in _expand(curve, run.rows)]
        for number, curve in enumerate(curves):
            names = [run.label] * (len(runs) > 1) + [curve.label] * (len(curves) > 1)
            style = STYLES[number % len(STYLES)]
            if len(runs) == 1:
                colour = COLOURS[number % len(COLOURS)]
            _draw(axes, run.rows, curve, colour=colour, style=style, label=" ".join(names))
    if panel.is_log:
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return _card(panel.title, panel.caption, figure)


def _expand(curve: Curve, rows: Sequence[Row]) -> list[Curve]:
    if not curve.key.endswith("/"):
        return [curve] if any(curve.key in row for row in rows) else []
    return [Curve(key=key, label=key.removeprefix(curve.key)) for key in keys_under(curve.key, rows)]


def _draw(axes: Axes, rows: Sequence[Row], curve: Curve, *, colour: str, style: str, label: str) -> None:
    """Adds one curve and its band."""
    points = [(row["step"], row[curve.key] * curve.scale) for row in rows if curve.key in row]
    steps, values = [p[0] for p in points], [p[1] for p in points]
    marker = "o" if len(points) <= 20 else None
    if len(points) >= SMOOTH_FROM:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        values = _smooth(values)
    axes.plot(
        steps, values, style, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label or None
    )
    low, high = f"{curve.band}_p10", f"{curve.band}_p90"
    band = [(row["step"], row[low], row[high]) for row in rows if low in row and high in row]
    if curve.band and band:
        at, lows, highs = zip(*band, strict=True)
        axes.fill_between(at, lows, highs, color=colour, alpha=0.12, linewidth=0)


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over a twentieth of the run, shorter at both ends."""
    half = max(1, len(values) // 40)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _timers_card(run: Run, num_runs: int) -> str:
    keys = [key for key in keys_under("timers/", run.rows) if key != NOT_STACKED]
    if not keys:
        return ""
    figure, axes = _new_figure()
    steps = [row["step"] for row in run.rows]
    parts = [[row.get(key, 0.0) for row in run.rows] for key in keys]
    names = [key.removeprefix("timers/") for key in keys]
    colours = _colours(len(keys))
    if len(steps) > 1:
        axes.stackplot(steps, parts, labels=names, colors=colours, alpha=0.75)
    else:  # a stack of areas needs two steps to be seen
        axes.bar(names, [part[0] for part in parts], color=colours)
    if NOT_STACKED in run.rows[-1] and len(steps) > 1:
        whole = [row.get(NOT_STACKED, float("nan")) for row in run.rows]
        axes.plot(steps, whole, color="#111827", linewidth=1, label="step")
    if len(steps) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=3)
    title = "Seconds per step" + (f": {run.label}" if num_runs > 1 else "")
    return _card(title, "By part, the slowest rank; white under the line is everything else.", figure)


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=8, colors="#374151")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", fontsize=8, color="#374151")
    return figure, axes


def _card(title: str, caption: str, figure: Figure) -> str:
    """The figure as SVG in an <img>, where ids of several figures cannot clash."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(title)
    return (
        f'<figure><h3>{text}</h3><img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #111827; background: #f3f4f6; margin: 0 auto; padding: 24px;
  max-width: 1500px; }
h1 { font-size: 24px; margin: 0 0 8px; } h2 { font-size: 17px; margin: 28px 0 8px; }
h3 { font-size: 15px; margin: 0 0 4px; }
.runs { list-style: none; padding: 0; margin: 0; color: #4b5563; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: white; border-radius: 8px; font-size: 13px; }
th, td { padding: 5px 14px; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: #4b5563; font-weight: 600; }
td { font-variant-numeric: tabular-nums; } tr.marked td { background: #fef9c3; }
details { margin-top: 8px; } summary { cursor: pointer; color: #4b5563; }
.note, figcaption { color: #6b7280; font-size: 12.5px; margin: 4px 0 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 16px; margin-top: 28px; }
figure { background: white; border-radius: 8px; padding: 14px 16px; margin: 0; } img { width: 100%; height: auto; }
</style></head><body>
@BODY@
</body></html>
"""
