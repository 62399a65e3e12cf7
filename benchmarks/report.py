"""The measurements as a Markdown table, the project's targets, and a plot."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from implementations import FP32_COPY, OURS, OURS_COPY, OURS_ONE_BLOCK, VERL
from measure import Measurement

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ITEM_BYTES = {"fp32": 4, "bf16": 2}
PASSES = 3  # over the logits that the arithmetic needs: forward reads, backward reads and writes
GRADIENT_LIMITS = {"fp32": 1e-6, "bf16": 2.0**-7}
NOTES = """\
- CPU seconds: of rank 0, forward and backward of sum(a_t logp_t) + b sum(H_t), fastest of the repeats; the
  implementations take turns in one process with one thread a rank. glibc keeps freed memory while timed, as
  a GPU's allocator does.
- Extra memory: highest resident size during forward and backward above the size with the logits alone, as a
  multiple of the logits' bytes on that rank; the worst rank. The gradient counts, unless it is written over
  the logits.
- Collectives: operations started in forward + in backward, and the bytes this rank contributes per token.
- Errors: largest against float64 of the same logits, {rows} tokens; the gradient's relative to its largest
  entry.
- Peers are imported from their packages and called as their trainers do. verl: entropy, then log-prob on a
  clone, because megatron-core's cross entropy overwrites fp32 logits. NeMo-Aligner: the calls of its PPO
  actor; it gives only the mean entropy. For bf16, "on an fp32 copy" is what Megatron's Float16Module feeds
  these functions in a training run; the plain rows are given bf16.
- megatron-core alone has no entropy, and overwrites fp32 logits. torch at TP 2 works on the logits that
  megatron-core gathers."""
ON_CPU = """
- megatron-core's gather allocates on torch.cuda.current_device(); here that function returns the CPU.
- What verl and megatron-core give to torch.compile runs eagerly without a C++ compiler. Here: {compiler}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    tensor_parallel: int
    dtype: str  # fp32 or bf16
    results: dict[str, Measurement]  # by implementation

    @property
    def title(self) -> str:
        return f"TP {self.tensor_parallel}, {self.dtype}"

    def verl_seconds(self) -> float | None:
        """The faster of verl's rows."""
        rows = [self.results[name].seconds for name in (VERL, VERL + FP32_COPY) if name in self.results]
        return min(rows) if rows else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    device: str  # cpu or cuda
    versions: dict[str, str]
    missing: tuple[str, ...]
    tokens: int  # for memory and errors
    timed_tokens: int
    vocabulary: int
    repeats: int
    reference_rows: int
    copy_bandwidth: float | None  # bytes/s read and written by a device copy; None on the CPU


def markdown(settings: Sequence[Setting], run: Run) -> str:
    parts = [
        "# Log-probability and entropy of each token, with gradient: ours beside the peers",
        f"V = {run.vocabulary}; time: {run.timed_tokens} tokens, best of {run.repeats}; "
        f"memory: {run.tokens} tokens.\n" + _machine(run),
        *(_table(setting, run) for setting in settings),
        "## Targets\n\n" + "\n".join(_targets(settings)),
        "## How it was measured\n\n"
        + NOTES.format(rows=run.reference_rows)
        + (ON_CPU.format(compiler=shutil.which("g++") or "none") if run.device == "cpu" else ""),
    ]
    parts += ["## Not measured\n\n" + "\n".join(f"- {line}" for line in _not_measured(run))]
    return "\n\n".join(parts) + "\n"


def _machine(run: Run) -> str:
    if run.device == "cpu":
        info = Path("/proc/cpuinfo").read_text()
        match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
        name = f"{match[1] if match else platform.machine()}, {os.cpu_count()} cores"
    else:
        name = torch.cuda.get_device_name()
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    command = " ".join(["python", "benchmarks/token_stats.py", *sys.argv[1:]])
    return f"Machine: {name}. {versions}. {datetime.date.today()}, `{command}`."


def _not_measured(run: Run) -> Iterator[str]:
    yield from run.missing
    if not torch.cuda.is_available():
        yield "no GPU here: not measured (`--device cuda` on a machine with one)"
    elif run.device == "cpu":
        yield "the GPU of this machine: `--device cuda`"


def _table(setting: Setting, run: Run) -> str:
    ours, verl = setting.results[OURS].seconds, setting.results.get(VERL)
    time_head = "CPU s" if run.device == "cpu" else "GPU ms | GB/s (of a copy's)"
    lines = [
        f"## {setting.title} logits",
        "",
        f"| implementation | {time_head} | / ours | / verl | extra memory | collectives | bytes a token "
        "| logp error | H error | gradient error |",
        "|---|" + "---:|" * (9 + (run.device != "cpu")),
    ]
    for name, row in setting.results.items():
        entropy = "-" if row.entropy_error is None else f"{row.entropy_error:.1e}"
        cells = [
            name,
            _time(row, setting, run),
            f"{row.seconds / ours:.2f}",
            "-" if verl is None else f"{row.seconds / verl.seconds:.2f}",
            f"{row.extra_memory:.2f}x",
            f"{row.collectives[0]} + {row.collectives[1]}",
            f"{row.bytes_per_token[0]:.0f} + {row.bytes_per_token[1]:.0f}",
            f"{row.logprobs_error:.1e}",
            entropy,
            f"{row.gradient_error:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(row: Measurement, setting: Setting, run: Run) -> str:
    if run.copy_bandwidth is None:
        return f"{row.seconds:.3f}"
    logits = run.timed_tokens * run.vocabulary // setting.tensor_parallel * ITEM_BYTES[setting.dtype]
    achieved = PASSES * logits / row.seconds
    share = achieved / run.copy_bandwidth
    return f"{row.seconds * 1000:.3f} | {achieved / 1e9:.0f} ({share:.0%})"


def _targets(settings: Sequence[Setting]) -> Iterator[str]:
    """One line each, with the measured value; a missed target is reported, not raised."""
    for setting in settings:
        verl, ours = setting.verl_seconds(), setting.results[OURS].seconds
        if verl is None:
            yield f"- not measured: time against verl, {setting.title}"
        else:
            rule = f"time at most 0.5 x verl's (its faster row), {setting.title}"
            yield _verdict(ours / verl <= 0.5, rule, f"{ours / verl:.2f} x")
    costs = {
        setting.title: setting.results[OURS].seconds / setting.results[OURS_ONE_BLOCK].seconds - 1
        for setting in settings
        if OURS_ONE_BLOCK in setting.results
    }
    if costs:
        mean = sum(costs.values()) / len(costs)
        listed = _listed({title: f"{100 * cost:+.0f} %" for title, cost in costs.items()})
        rule = "the same bits at every TP size (8 blocks) cost at most 5 % on average"
        yield _verdict(mean <= 0.05, rule, f"{100 * mean:+.1f} % ({listed})")
    for name, limit in ((OURS, 0.1), (OURS_COPY, 1.1)):
        worst = max(settings, key=lambda setting: setting.results[name].extra_memory)
        value = worst.results[name].extra_memory
        rule = f"extra memory at most {limit} x the logits, {name}"
        yield _verdict(value <= limit, rule, f"at worst {value:.2f} x ({worst.title})")
    counts = {setting.title: "{} + {}".format(*setting.results[OURS].collectives) for setting in settings}
    is_met = all(
        setting.results[OURS].collectives == (int(setting.tensor_parallel > 1), 0) for setting in settings
    )
    yield _verdict(is_met, "collectives 1 + 0 (none at TP 1)", _listed(counts))
    mine = [(setting.dtype, setting.results[name]) for setting in settings for name in (OURS, OURS_COPY)]
    is_met = all(row.is_within_tolerance for _, row in mine)
    error = max(max(row.logprobs_error, row.entropy_error or 0.0) for _, row in mine)
    yield _verdict(is_met, "log-prob and entropy within 2e-6 + 5e-7 relative", f"at worst {error:.1e}")
    for dtype in dict.fromkeys(dtype for dtype, _ in mine):
        error = max(row.gradient_error for row_dtype, row in mine if row_dtype == dtype)
        rule = f"gradient within {GRADIENT_LIMITS[dtype]:.1e} of the largest entry, {dtype}"
        yield _verdict(error <= GRADIENT_LIMITS[dtype], rule, f"at worst {error:.1e}")


def _verdict(is_met: bool, rule: str, value: str) -> str:
    return f"- {'pass' if is_met else '**NOT REACHED**'}: {rule}: {value}"


def _listed(values: dict[str, str]) -> str:
    return "; ".join(f"{title}: {value}" for title, value in values.items())


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GiB on the CUDA device; the fastest of ten."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return 2 * source.nbytes / min(times)


def save_plot(settings: Sequence[Setting], run: Run, path: Path) -> None:
    """Two panels over the implementations: time relative to ours, and extra memory."""
    names = list(max((setting.results for setting in settings), key=len))
    figure, panels = plt.subplots(
        1, 2, figsize=(12, 1.2 + 0.42 * len(names)), sharey=True, layout="constrained"
    )
    markers = ("o", "s", "D", "^")
    for index, setting in enumerate(settings):
        offset = (index - (len(settings) - 1) / 2) * 0.17
        rows = [(y, setting.results[name]) for y, name in enumerate(names) if name in setting.results]
        heights = [y + offset for y, _ in rows]
        ours = setting.results[OURS].seconds
        style = {"marker": markers[index % 4], "linestyle": "none", "label": setting.title, "markersize": 6}
        panels[0].plot([row.seconds / ours for _, row in rows], heights, **style)
        panels[1].plot([max(row.extra_memory, 0.01) for _, row in rows], heights, **style)
    unit = "CPU seconds" if run.device == "cpu" else "GPU time"
    panels[0].set_title(f"{unit}, forward + backward, in multiples of ours")
    panels[1].set_title("extra memory, in multiples of the logits")
    for panel, line, label in zip(
        panels, (2.0, 0.1), ("target: verl's right of here", "target: first row left of here"), strict=True
    ):
        panel.axvline(line, color="0.4", linewidth=1, linestyle="--", label=label)
        panel.set_xscale("log")
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
        panel.minorticks_off()
        panel.legend(loc="upper right", framealpha=1.0, fontsize=9)
        for y in range(len(names) - 1):
            panel.axhline(y + 0.5, color="0.85", linewidth=0.8)
    panels[0].set_xticks(ticks := (1, 2, 3, 5, 10, 20), [f"{tick}x" for tick in ticks])
    panels[1].set_xticks(
        ticks := (0.01, 0.1, 1, 2, 5, 10, 20), ["<= 0.01x", *(f"{tick:g}x" for tick in ticks[1:])]
    )
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.suptitle(f"log-prob and entropy of {run.timed_tokens} tokens, V = {run.vocabulary}", fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)
