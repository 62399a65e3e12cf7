"""What a study leaves: one self-contained page, the same as Markdown with its plots, and verdicts.json."""

from __future__ import annotations

import base64
import html
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from megatron_fec.study.experiments import EXPERIMENTS
from megatron_fec.study.results import Result, as_json, counts
from megatron_fec.study.variants import BEDS

PACKAGES = ("megatron_fec", "torch", "megatron-core", "mbridge", "transformers", "numpy")
HOW_TO_READ = (
    "Each claim is a number per seed that is above 0 when the claim holds, mostly the difference of two runs of the same "
    "seed: its margin. Cells hold the verdict, then the margin's mean and standard deviation over seeds. yes: the 95 % "
    "interval of a (paired) t-test over seeds lies above 0; no: below; unclear: neither, or one seed only. Many claims "
    "are tested without a correction, so one in forty that is not true may still come out as yes."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """How the results came about."""

    command: str
    scale: str
    seeds: int
    jobs: int
    constants: tuple[str, ...]  # one sentence a bed
    unit_seconds: float  # of all units, each on one core
    wall_seconds: float  # of this command; less than a whole study where units were done before
    failures: tuple[str, ...]


def write_results(
    output: Path, names: Sequence[str], results: Sequence[Result], plots: Mapping[str, bytes], about: About
) -> None:
    """study.html, README.md, verdicts.json and one NAME.png an experiment, in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    facts = _facts(about)
    for name, png in plots.items():
        (output / f"{name}.png").write_bytes(png)
    verdicts = {
        "about": asdict(about) | {"machine": machine(), "versions": versions()},
        "results": as_json(results),
    }
    (output / "verdicts.json").write_text(json.dumps(verdicts, indent=1) + "\n", encoding="utf-8")
    (output / "README.md").write_text(_markdown(names, results, plots, facts), encoding="utf-8")
    (output / "study.html").write_text(_html(names, results, plots, facts), encoding="utf-8")


def machine() -> str:
    """Model and number of the processor's cores, and the system."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{os.cpu_count()} cores, {model}, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def _facts(about: About) -> list[tuple[str, str]]:
    """(name, value) rows; the values are plain text."""
    return [
        ("command", about.command),
        ("scale", f"{about.scale}, {about.seeds} seeds, {about.jobs} at a time"),
        ("machine", machine()),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        (
            "time",
            f"{about.unit_seconds / 60:.1f} minutes of runs, one core each; this command took "
            f"{about.wall_seconds / 60:.1f} minutes (what an earlier start had finished was not run again)",
        ),
        *(("constants", text) for text in about.constants),
        *(("failed", text) for text in about.failures),
    ]


def _rows(name: str, results: Sequence[Result]) -> list[tuple[str, str, dict[str, Result]]]:
    """(claim, unit, its results by bed) of an experiment."""
    rows: dict[str, tuple[str, str, dict[str, Result]]] = {}
    for result in results:
        if result.experiment == name:
            row = rows.setdefault(result.claim.text, (result.claim.text, result.claim.unit, {}))
            row[2][result.bed] = result
    return list(rows.values())


def _cell(result: Result | None) -> tuple[str, str]:
    """(verdict, margin) as text."""
    if result is None:
        return "", ""
    verdict = result.verdict
    if verdict is None:
        return "not run", ""
    spread = "" if verdict.sd is None else f" +- {verdict.sd:.2g}"
    return verdict.reproduces, f"{verdict.mean:+.3g}{spread}"


def _beds(name: str, results: Sequence[Result]) -> list[str]:
    used = {result.bed for result in results if result.experiment == name}
    return [bed for bed in BEDS if bed in used]


def _summary(results: Sequence[Result]) -> str:
    found = counts(results)
    parts = [f"{found['yes']} claims reproduce", f"{found['no']} do not", f"{found['unclear']} are unclear"]
    return ", ".join(parts) + (
        f", {found['not run']} were not run at this scale." if found["not run"] else "."
    )


def _failing(results: Sequence[Result]) -> list[str]:
    """The claims that do not reproduce, in words."""
    return [
        f"{EXPERIMENTS[r.experiment].title} - {BEDS[r.bed].title}: {r.claim.text} ({_cell(r)[1]} {r.claim.unit})"
        for r in results
        if r.verdict is not None and r.verdict.reproduces == "no"
    ]


def _markdown(
    names: Sequence[str],
    results: Sequence[Result],
    plots: Mapping[str, bytes],
    facts: Sequence[tuple[str, str]],
) -> str:
    lines = ["# The experiments of arXiv 2602.09782 at CPU scale", "", _summary(results), "", HOW_TO_READ, ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_code(name, value)} |" for name, value in facts), ""]
    lines += [
        "## What does not reproduce",
        "",
        *(f"- {text}" for text in _failing(results) or ["Nothing."]),
        "",
    ]
    for name in names:
        experiment, beds = EXPERIMENTS[name], _beds(name, results)
        lines += [f"## {experiment.title}", "", experiment.about, ""]
        if name in plots:
            lines += [f"![{experiment.title}]({name}.png)", ""]
        lines += [f"| claim | unit | {' | '.join(BEDS[bed].title for bed in beds)} |"]
        lines += [f"|---|---|{'---|' * len(beds)}"]
        for text, unit, by_bed in _rows(name, results):
            cells = [" ".join(_cell(by_bed.get(bed))).strip() for bed in beds]
            lines.append(f"| {text} | {unit} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _code(name: str, value: str) -> str:
    return f"`{value}`" if name == "command" else value


def _html(
    names: Sequence[str],
    results: Sequence[Result],
    plots: Mapping[str, bytes],
    facts: Sequence[tuple[str, str]],
) -> str:
    rows = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in facts)
    failing = "".join(f"<li>{html.escape(text)}</li>" for text in _failing(results) or ["Nothing."])
    parts = [
        f"<h1>The experiments of arXiv 2602.09782 at CPU scale</h1><p>{html.escape(_summary(results))}</p>",
        f'<p class="note">{html.escape(HOW_TO_READ)}</p>',
        _verdict_table(names, results),
        f"<h2>What does not reproduce</h2><ul>{failing}</ul>",
        f'<h2>How it was made</h2><table class="facts">{rows}</table>',
    ]
    for name in names:
        experiment = EXPERIMENTS[name]
        text = html.escape(experiment.title)
        parts.append(f'<h2 id="{name}">{text}</h2><p>{html.escape(experiment.about)}</p>')
        if name in plots:
            data = base64.b64encode(plots[name]).decode()
            parts.append(f'<img alt="{text}" src="data:image/png;base64,{data}">')
        parts.append(f"<details><summary>all numbers</summary>{_numbers_table(name, results)}</details>")
    return _PAGE.replace("@BODY@", "\n".join(parts))


def _verdict_table(names: Sequence[str], results: Sequence[Result]) -> str:
    """One row a claim, one column a bed."""
    beds = [bed for bed in BEDS if any(result.bed == bed for result in results)]
    head = "".join(f"<th>{html.escape(BEDS[bed].title)}</th>" for bed in beds)
    body = ""
    for name in names:
        title = html.escape(EXPERIMENTS[name].title)
        body += f'<tr class="group"><td colspan="{len(beds) + 2}"><a href="#{name}">{title}</a></td></tr>'
        for text, unit, by_bed in _rows(name, results):
            cells = ""
            for bed in beds:
                verdict, margin = _cell(by_bed.get(bed))
                cells += (
                    f'<td class="{verdict.replace(" ", "-")}"><b>{verdict}</b> {html.escape(margin)}</td>'
                )
            body += f"<tr><td>{html.escape(text)}</td>{cells}<td>{html.escape(unit)}</td></tr>"
    return f"<table><thead><tr><th>claim</th>{head}<th>unit</th></tr></thead><tbody>{body}</tbody></table>"


def _numbers_table(name: str, results: Sequence[Result]) -> str:
    body = ""
    for result in results:
        verdict = result.verdict
        if result.experiment != name or verdict is None:
            continue
        interval = "-" if verdict.interval is None else "{:+.4g} to {:+.4g}".format(*verdict.interval)
        values = ", ".join(f"{value:+.4g}" for value in verdict.values)
        numbers = [
            f"{verdict.mean:+.4g}",
            _number(verdict.sd),
            interval,
            _number(verdict.t),
            _number(verdict.p),
        ]
        cells = [
            result.claim.text,
            BEDS[result.bed].title,
            verdict.reproduces,
            *numbers,
            values,
            result.claim.unit,
        ]
        body += f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    names = ("claim", "bed", "reproduces", "mean", "sd", "95 % interval", "t", "p", "margin by seed", "unit")
    head = "".join(f"<th>{text}</th>" for text in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>megatron_fec study</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #111827; background: #f9fafb; margin: 0 auto; padding: 24px;
  max-width: 1300px; }
h1 { font-size: 24px; margin: 0 0 8px; } h2 { font-size: 18px; margin: 32px 0 8px; }
table { border-collapse: collapse; background: white; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: 4px 10px; text-align: left; border-bottom: 1px solid #e5e7eb; }
td { font-variant-numeric: tabular-nums; } tr.group td { background: #eef2ff; font-weight: 600; }
td.yes b { color: #047857; } td.no b { color: #b91c1c; } td.unclear b { color: #b45309; }
td.not-run b { color: #9ca3af; font-weight: 400; }
.facts td:first-child { color: #4b5563; white-space: nowrap; vertical-align: top; } a { color: inherit; }
.note { color: #6b7280; font-size: 13px; } img { max-width: 100%; height: auto; background: white; }
details { margin-top: 8px; } summary { cursor: pointer; color: #4b5563; }
</style></head><body>
@BODY@
</body></html>
"""
