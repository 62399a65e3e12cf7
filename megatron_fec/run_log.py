"""What a run tells: metrics.jsonl, the terminal, wandb, and the timers that feed all three.

Metric names start with train_rollouts/, train_optim/, val_rollouts/, timers/ or memory/. Only the main rank writes; on
the others every method of RunLog returns at once, so callers need no rank checks.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_fec.config import ConfigError

Row = dict[str, float]  # one step; the key "step" is always there

TOKENS_PER_SECOND = "train_rollouts/tokens_per_second"
COLUMNS = (  # heading, metric, format, of the line that each step prints
    ("reward", "train_rollouts/reward", "7.3f"),
    ("entropy", "train_rollouts/entropy", "8.3f"),
    ("eps-", "train_optim/eps_lower_mean", "6.3f"),
    ("eps+", "train_optim/eps_upper_mean", "6.3f"),
    ("clip-", "train_optim/clip_fraction_lower", "8.5f"),
    ("clip+", "train_optim/clip_fraction_upper", "8.5f"),
    ("length", "train_rollouts/response_length", "7.1f"),
    ("tok/s", TOKENS_PER_SECOND, "7.0f"),
)
HEADING_EVERY = 20  # lines
SUMMARY = (  # heading, metric or prefix of metrics, of the closing table and of the report's
    ("reward", "train_rollouts/reward"),
    ("entropy", "train_rollouts/entropy"),
    ("pass rate of groups", "train_rollouts/group_pass_rate"),
    ("pass@k", "val_rollouts/pass_at_k/"),
    ("mean@k", "val_rollouts/mean_at_k/"),
    ("eps_lower", "train_optim/eps_lower_mean"),
    ("eps_upper", "train_optim/eps_upper_mean"),
    ("clip fraction, lower", "train_optim/clip_fraction_lower"),
    ("clip fraction, upper", "train_optim/clip_fraction_upper"),
    ("response length", "train_rollouts/response_length"),
)


class RunLog:
    """Writes one row a step to `run_dir`/metrics.jsonl, to the terminal, and to wandb when asked."""

    def __init__(
        self, run_dir: Path, *, total_steps: int, is_main: bool, wandb_mode: str, config_text: str
    ) -> None:
        """wandb_mode: off | offline | online. config_text: the resolved configuration, YAML, shown by wandb."""
        self.path = run_dir / "metrics.jsonl"
        self.is_main = is_main
        self.total_steps = total_steps
        self._lines = 0
        self._first: tuple[int, float] | None = None  # step and start time of the first step of this process
        self._console = Console(highlight=False)
        self._progress: Progress | None = None
        self._wandb: Any = None
        if not is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        if wandb_mode != "off":
            self._wandb = _start_wandb(run_dir, wandb_mode, config_text)

    def truncate_to(self, step: int) -> None:
        """Drops the rows of `step` and later, and a half-written last line: a resumed run writes them again.

        Call once before the first write; step 0 starts an empty file.
        """
        if not self.is_main:
            return
        rows = [row for row in read_rows(self.path) if row["step"] < step] if self.path.exists() else []
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_json_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the row of `step` to the file, on disk when this returns, then shows it."""
        if not self.is_main:
            return
        row: Row = {"step": step, **metrics}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_json_line(row))
            file.flush()
            os.fsync(file.fileno())
        if self._wandb is not None:
            self._wandb.log(row)
        self._show(row)

    def note(self, text: str) -> None:
        """Prints one line, such as what the run is doing before its first step."""
        if self.is_main:
            self._print(text)

    def finish(self) -> None:
        """Ends the progress display and wandb, and prints start, middle and end of the whole run."""
        if not self.is_main:
            return
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        if self.path.exists():
            self._console.print(summary_table(read_rows(self.path)))

    def _show(self, row: Row) -> None:
        step, now = int(row["step"]), time.monotonic()
        if self._first is None:
            self._first = (step, now - row.get("timers/step", 0.0))
        done = step - self._first[0] + 1
        eta = (now - self._first[1]) / done * (self.total_steps - step - 1)
        if self._progress is None and self._console.is_terminal:
            self._progress = _progress_bar(self._console, self.total_steps)
            self._progress.start()
        if self._lines % HEADING_EVERY == 0:
            self._print(heading_line(self.total_steps))
        self._lines += 1
        self._print(step_line(row, self.total_steps, eta))
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step + 1, eta=_duration(eta))

    def _print(self, text: str) -> None:
        if self._console.is_terminal:  # above the progress bar
            self._console.print(text, markup=False, no_wrap=True, overflow="ellipsis")
        else:  # a file or a pipe: no cutting at 80 columns
            print(text, flush=True)


class Timers:
    """Wall-clock seconds by name; the host's clock, so a caller who times GPU work synchronizes first."""

    def __init__(self, during: Callable[[str], AbstractContextManager] = nullcontext) -> None:
        """during: what else watches a block, given its name, such as its memory."""
        self._seconds: dict[str, float] = {}
        self._during = during

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`, also when it raises."""
        start = time.perf_counter()
        try:
            with self._during(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Name -> seconds since the last reset."""
        return dict(self._seconds)

    def reset(self) -> None:
        """Forgets everything; call at the start of a step."""
        self._seconds.clear()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, in file order, null values left out.

    A last line without its newline was cut off by a crash and is ignored; any other broken line is an error.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({key: float(value) for key, value in row.items() if value is not None})
            rows[-1]["step"] = int(row["step"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is not a metrics row (a JSON object with the key step). Remove the line."
            ) from error
    return rows


def start_middle_end(rows: Sequence[Row], key: str) -> tuple[float, float, float] | None:
    """Means of `key` over the first, central and last tenth (at least one row) of the rows that have it, else None."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return None
    width = max(1, len(values) // 10)
    centre = (len(values) - width) // 2
    windows = (values[:width], values[centre : centre + width], values[-width:])
    first, middle, last = (sum(window) / width for window in windows)
    return first, middle, last


def keys_under(prefix: str, rows: Sequence[Row]) -> list[str]:
    """Metrics of the rows that start with `prefix`, shorter names first: k = 2 before k = 16."""
    return sorted(
        {key for row in rows for key in row if key.startswith(prefix)}, key=lambda key: (len(key), key)
    )


def summary_rows(rows: Sequence[Row]) -> list[tuple[str, tuple[float, float, float]]]:
    """(name, (start, middle, end)) of each quantity of SUMMARY that the rows hold."""
    found = []
    for name, key in SUMMARY:
        for full in keys_under(key, rows) if key.endswith("/") else [key]:
            values = start_middle_end(rows, full)
            if values is not None:
                found.append((f"{name} {full.removeprefix(key)}".strip(), values))
    return found


def summary_table(rows: Sequence[Row]) -> Table:
    """What the terminal shows at the end of a run."""
    table = Table(
        title=f"steps: {len(rows)}", caption="means over the first, central and last tenth of the steps"
    )
    table.add_column("")
    for heading in ("start", "middle", "end"):
        table.add_column(heading, justify="right")
    for name, values in summary_rows(rows):
        table.add_row(name, *(format_value(v) for v in values))
    return table


def format_value(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def heading_line(total_steps: int) -> str:
    """Column names above the lines of step_line."""
    names = [f"{name:>{_width(form)}}" for name, _, form in COLUMNS]
    return " ".join([f"{'step':>{_step_width(total_steps)}}", *names, f"{'ETA':>8}"])


def step_line(row: Row, total_steps: int, eta: float) -> str:
    """One step for the terminal; a metric that the row lacks is a dash."""
    cells = [f"{int(row['step']) + 1}/{total_steps}".rjust(_step_width(total_steps))]
    for _, key, form in COLUMNS:
        cells.append(f"{row[key]:{form}}" if key in row else "-".rjust(_width(form)))
    return " ".join([*cells, _duration(eta).rjust(8)])


def _json_line(row: Mapping[str, float]) -> str:
    """JSON knows no NaN or infinity: they become null."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"


def _width(form: str) -> int:
    return int(form.split(".")[0])


def _step_width(total_steps: int) -> int:
    return max(4, 2 * len(str(total_steps)) + 1)


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _progress_bar(console: Console, total_steps: int) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA {task.fields[eta]}"))
    progress = Progress(*columns, console=console)
    progress.add_task("", total=total_steps, eta="-")
    return progress


def _start_wandb(run_dir: Path, mode: str, config_text: str) -> Any:
    """A wandb run in `run_dir`/wandb. Resumed steps are logged again: wandb cannot drop rows."""
    try:
        import wandb  # optional, and seconds to import: only a run that asks for it pays
    except ImportError as error:
        raise ConfigError(
            f"trainer.wandb={mode} needs the wandb package. Install it (pip install wandb) or set trainer.wandb=off."
        ) from error
    config = OmegaConf.to_container(OmegaConf.create(config_text))
    run = wandb.init(project="megatron_fec", name=run_dir.name, dir=run_dir, mode=mode, config=config)  # type: ignore[arg-type]
    run.define_metric("*", step_metric="step")
    return run
