"""Reads the dumps of rollout_dump.py: each update as the inputs of a loss; rows that cannot be right are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds
from megatron_fec.config import ConfigError
from megatron_fec.rollout_dump import (
    OPTIONAL,
    SCHEMA,
    SCHEMA_VERSION,
    SETTINGS_KEY,
    VERSION_KEY,
    DumpSettings,
)
from megatron_fec.types import BlendWeights, ClipBounds, LossInputs, UpdateTokens

SLACK = 1e-4  # rounding may carry a log-probability above 0, or an entropy below it
SHOWN_FAULTS = 3  # in the text of an error
Column = np.ndarray
LOGPROB = ("finite and at most 0", lambda x: np.isfinite(x) & (x <= SLACK))
ENTROPY = ("finite and 0 or more", lambda x: np.isfinite(x) & (x >= -SLACK))
FINITE = ("finite", np.isfinite)
COUNTED = ("0 or more", lambda x: x >= 0)
RULES: dict[str, tuple[str, Callable[[Column], Column]]] = {  # what a row must be, or it is corrupt
    "step": COUNTED,
    "update": COUNTED,
    "epoch": COUNTED,
    "seed": COUNTED,
    "sequence_id": COUNTED,
    "position": COUNTED,
    "token_id": COUNTED,
    "response_length": ("1 or more", lambda x: x >= 1),
    "logprob": LOGPROB,
    "old_logprob": LOGPROB,
    "rollout_logprob": LOGPROB,
    "reference_logprob": LOGPROB,
    "entropy": ENTROPY,
    "old_entropy": ENTROPY,
    "alignment": FINITE,
    "sum_p2": ("in (0, 1]", lambda x: (x > 0) & (x <= 1 + SLACK)),
    "advantage": FINITE,
    "entropy_coef": FINITE,
}
SORTED_BY = ("epoch", "update", "sequence_id", "position")


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpedUpdate:
    """The response tokens of one update over all parts: [N] tensors by sequence id, then by position."""

    settings: DumpSettings
    update: int
    epoch: int
    seed: int
    sequence_ids: Tensor  # int64
    positions: Tensor  # int64
    token_ids: Tensor  # int64
    logprobs: Tensor  # fp32, as all that follow
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    reference_logprobs: Tensor | None
    entropy: Tensor
    old_entropy: Tensor | None
    alignment: Tensor
    sum_p2: Tensor
    advantages: Tensor
    entropy_coefs: Tensor | None

    def bounds(self, weights: BlendWeights, lines: ThresholdLines) -> ClipBounds:
        return clip_bounds(self.logprobs.exp(), weights, lines=lines)

    def tokens(self, bounds: ClipBounds) -> UpdateTokens:
        """What a loss marks its tokens from."""
        return UpdateTokens(
            logprobs=self.logprobs,
            old_logprobs=self.old_logprobs,
            advantages=self.advantages,
            entropy=self.entropy,
            alignment=self.alignment,
            bounds=bounds,
            sequence_ids=self.sequence_ids,
            log_ratio_clamp=self.settings.log_ratio_clamp,
            seed=self.seed,
        )

    def loss_inputs(self, bounds: ClipBounds, marks: Tensor | None = None) -> LossInputs:
        """The whole update as one micro-batch without padding; lengths are counted in the rows that are there."""
        _, inverse, lengths = torch.unique_consecutive(
            self.sequence_ids, return_inverse=True, return_counts=True
        )
        return LossInputs(
            logprobs=self.logprobs,
            old_logprobs=self.old_logprobs,
            advantages=self.advantages,
            response_mask=torch.ones_like(self.sequence_ids, dtype=torch.bool),
            bounds=bounds,
            entropy=self.entropy,
            alignment=self.alignment,
            rollout_logprobs=self.rollout_logprobs,
            reference_logprobs=self.reference_logprobs,
            entropy_coefs=self.entropy_coefs,
            marks=marks,
            sequence_ids=self.sequence_ids,
            response_starts=inverse.diff(prepend=inverse.new_tensor([-1])) != 0,
            response_lengths=lengths[inverse],
            update_lengths=lengths,
            max_response_tokens=self.settings.max_response_tokens,
            aggregation=self.settings.aggregation,
            log_ratio_clamp=self.settings.log_ratio_clamp,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """One step."""

    settings: DumpSettings
    updates: list[DumpedUpdate]  # as they were made
    faults: list[str]  # what was skipped: file and row, or file, and why


def dump_folders(path: Path) -> list[Path]:
    """The step folders below a run, its dumps/, or one step folder, in the order of the steps."""
    if any(path.glob("rank_*.parquet")):
        return [path]
    folders = sorted(path.glob("step_*")) or sorted(path.glob("dumps/step_*"))
    folders = [folder for folder in folders if any(folder.glob("rank_*.parquet"))]
    if not folders:
        raise ConfigError(
            f"{path} holds no dump: neither rank_0.parquet nor folders step_NNNNNN with one. Give RUN/dumps or one step "
            "of it; training writes them with trainer.dump_every."
        )
    return folders


class UnreadableStepError(ConfigError):
    """A step folder without one readable file."""


def read_dump(folder: Path, *, skip_corrupt: bool = False) -> Dump:
    """The updates of one step folder.

    Raises ConfigError for another schema version, and for rows and files that cannot be right; with skip_corrupt these
    are left out and named in `faults`.
    """
    settings, parts, faults = _read_parts(folder)
    columns, bad = _checked_columns(list(parts.values()), settings)
    order, unordered = _checked_order(columns, bad, is_whole=not faults and not bad)
    names, sizes = list(parts), [part.num_rows for part in parts.values()]
    starts = np.cumsum([0, *sizes])
    for row, fault in sorted((bad | unordered).items()):
        part = int(np.searchsorted(starts, row, side="right")) - 1
        faults.append(f"{names[part]} row {row - starts[part]}: {fault}")
    if faults and not skip_corrupt:
        raise ConfigError(
            f"{folder} has {len(faults)} corrupt rows or files: {some_of(faults)}. Use --skip-corrupt to leave them "
            "out, or dump the step again."
        )
    changes = np.diff(_keys(columns, order)[:2]).any(0)
    pieces = np.split(order, np.flatnonzero(changes) + 1)
    updates = [_update(columns, rows, settings) for rows in pieces if len(rows)]
    return Dump(settings=settings, updates=updates, faults=faults)


def some_of(faults: Sequence[str]) -> str:
    """The first few."""
    return "; ".join([*faults[:SHOWN_FAULTS], *["..."] * (len(faults) > SHOWN_FAULTS)])


def _read_parts(folder: Path) -> tuple[DumpSettings, dict[str, pa.Table], list[str]]:
    """The settings, the readable parts by file name, and why others are not; files beyond `parts` are an older run's."""
    tables: dict[str, pa.Table] = {}
    found: dict[str, DumpSettings] = {}
    unreadable: dict[str, str] = {}
    for path in sorted(folder.glob("rank_*.parquet"), key=lambda path: (len(path.name), path.name)):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                found[path.name] = _settings(path, file.schema_arrow)
                tables[path.name] = file.read()
        except (OSError, pa.ArrowException) as error:
            unreadable[path.name] = f"not readable ({str(error).splitlines()[0]})"
    if not tables:
        faults = [f"{name}: {fault}" for name, fault in unreadable.items()]
        raise UnreadableStepError(f"{folder} has no readable part: {some_of(faults)}. Dump the step again.")
    settings = found[next(iter(tables))]
    names = [f"rank_{part}.parquet" for part in range(settings.parts)]
    readable = {name: tables[name] for name in names if name in tables}
    for name in readable:
        if found[name] != settings:
            raise ConfigError(
                f"{folder / name} has other settings than the parts before it. Dump the step again."
            )
    faults = [f"{name}: {unreadable.get(name, 'missing')}" for name in names if name not in readable]
    return settings, readable, faults


def _settings(path: Path, schema: pa.Schema) -> DumpSettings:
    """What stands in the metadata of a part whose schema is the one that this module writes."""
    metadata = schema.metadata or {}
    if VERSION_KEY not in metadata:
        raise ConfigError(f"{path} is not a dump: it has no schema version. Give a folder of RUN/dumps.")
    version = metadata[VERSION_KEY].decode()
    if version != str(SCHEMA_VERSION):
        raise ConfigError(
            f"{path} has schema version {version}, and this megatron-fec reads version {SCHEMA_VERSION}. Read it with "
            "the release that wrote it, or dump the step again."
        )
    if not schema.equals(SCHEMA):
        raise ConfigError(f"{path} has other columns than schema version {version}. Dump the step again.")
    try:
        return DumpSettings.from_json(metadata[SETTINGS_KEY])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} has broken settings ({error!r}). Dump the step again.") from error


def _checked_columns(
    parts: Sequence[pa.Table], settings: DumpSettings
) -> tuple[dict[str, Column | None], dict[int, str]]:
    """The columns of all parts end to end, and the first fault of each row that breaks a rule. None: not in this run."""
    table = pa.concat_tables(parts)
    columns: dict[str, Column | None] = {}
    bad: dict[int, str] = {}
    for name, (rule, is_met) in RULES.items():
        column = table[name]
        if name in OPTIONAL and column.null_count == len(column):
            columns[name] = None
            continue
        nulls, values = column.is_null().to_numpy(), column.fill_null(0).to_numpy()
        columns[name] = values
        for row in np.flatnonzero(nulls | ~is_met(values)).tolist():
            bad.setdefault(row, f"{name}={'null' if nulls[row] else values[row]} must be {rule}")
    steps = table["step"].fill_null(0).to_numpy()
    for row in np.flatnonzero(steps != settings.step).tolist():
        bad.setdefault(row, f"step={steps[row]} must be {settings.step}, as the file's settings say")
    return columns, bad


def _checked_order(
    columns: Mapping[str, Any], bad: Mapping[int, str], *, is_whole: bool
) -> tuple[Column, dict[int, str]]:
    """Good rows in the order of SORTED_BY, and the faults of rows that do not fit together.

    is_whole: nothing was lost before, so each response must have all its rows in each of its updates.
    """
    is_good = np.ones(len(columns["step"]), dtype=bool)
    is_good[list(bad)] = False
    rows = np.flatnonzero(is_good)
    rows = rows[np.lexsort(_keys(columns, rows)[::-1])]
    changes = np.diff(_keys(columns, rows)) != 0
    faults = dict.fromkeys(rows[1:][~changes.any(0)].tolist(), "this token is there twice")
    if is_whole and not faults and len(rows):
        borders = np.flatnonzero(changes[:3].any(0)) + 1
        sizes = np.diff(borders, prepend=0, append=len(rows))
        present = np.repeat(sizes, sizes)
        for at in np.flatnonzero(columns["response_length"][rows] != present).tolist():
            length = columns["response_length"][rows[at]]
            faults[int(rows[at])] = f"response_length={length}, but the update has {present[at]} rows of it"
    is_good[list(faults)] = False
    return rows[is_good[rows]], faults


def _keys(columns: Mapping[str, Any], rows: Column) -> Column:
    return np.stack([columns[name][rows] for name in SORTED_BY])


def _update(columns: Mapping[str, Column | None], rows: Column, settings: DumpSettings) -> DumpedUpdate:
    def tensor(name: str) -> Tensor:
        values = columns[name]
        assert values is not None
        taken = torch.from_numpy(values[rows])
        return taken if taken.is_floating_point() else taken.long()

    def optional(name: str) -> Tensor | None:
        return None if columns[name] is None else tensor(name)

    return DumpedUpdate(
        settings=settings,
        update=int(tensor("update")[0]),
        epoch=int(tensor("epoch")[0]),
        seed=int(tensor("seed")[0]),
        sequence_ids=tensor("sequence_id"),
        positions=tensor("position"),
        token_ids=tensor("token_id"),
        logprobs=tensor("logprob"),
        old_logprobs=tensor("old_logprob"),
        rollout_logprobs=tensor("rollout_logprob"),
        reference_logprobs=optional("reference_logprob"),
        entropy=tensor("entropy"),
        old_entropy=optional("old_entropy"),
        alignment=tensor("alignment"),
        sum_p2=tensor("sum_p2"),
        advantages=tensor("advantage"),
        entropy_coefs=optional("entropy_coef"),
    )
