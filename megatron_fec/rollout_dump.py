"""The tokens of a training step as a Parquet table, written where a policy trains; dump_reader.py reads it.

RUN/dumps/step_NNNNNN/rank_R.parquet holds one row for each response token at each update that it took part in, with
what every loss may look at; the file's metadata holds the settings of that step. docs/replay.md describes both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from megatron_fec.algorithm.thresholds import ThresholdLines
from megatron_fec.types import BlendWeights, MicroBatch, TokenStats

SCHEMA_VERSION = 1
VERSION_KEY, SETTINGS_KEY = b"megatron_fec.schema_version", b"megatron_fec.settings"
OPTIONAL = ("reference_logprob", "old_entropy", "entropy_coef")  # null in every row where a run has none
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("update", pa.int32()),  # number of the optimizer step inside the step, over all epochs
        ("epoch", pa.int32()),
        ("seed", pa.int64()),  # of the update's choices at random
        ("sequence_id", pa.int32()),
        ("position", pa.int32()),  # in the sequence, prompt included, of the token before the one predicted
        ("token_id", pa.int32()),
        ("response_length", pa.int32()),
        ("logprob", pa.float32()),  # under the weights before this update
        ("old_logprob", pa.float32()),  # under those before the first update of the step
        ("rollout_logprob", pa.float32()),  # the engine's
        ("reference_logprob", pa.float32()),
        ("entropy", pa.float32()),
        ("old_entropy", pa.float32()),
        ("alignment", pa.float32()),
        ("sum_p2", pa.float32()),
        ("advantage", pa.float32()),
        ("entropy_coef", pa.float32()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpSettings:
    """What rows need beside themselves to be the inputs of a loss again; the same in all parts of a step."""

    step: int
    parts: int  # files, one of each rank that trained on tokens of its own
    group_size: int  # the prompt of a sequence is sequence_id // group_size, counted inside the step
    policy_loss: str
    options: Mapping[str, Any]  # algorithm.options, JSON types
    schedule: str  # its name
    weights: BlendWeights  # that it chose for this step
    lines: ThresholdLines
    aggregation: str
    log_ratio_clamp: float
    max_response_tokens: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> DumpSettings:
        """Raises ValueError, KeyError or TypeError where the text is not what to_json writes."""
        values = json.loads(text)
        lines = values.pop("lines")
        return DumpSettings(
            weights=BlendWeights(**values.pop("weights")),
            lines=ThresholdLines(
                eps_std=lines["eps_std"], upper=tuple(lines["upper"]), lower=tuple(lines["lower"])
            ),
            **values,
        )


def step_folder(dumps: Path, step: int) -> Path:
    return dumps / f"step_{step:06d}"


class RolloutDump:
    """Writes one rank's part of a step, in a `with` block; it stands under a temporary name until the end.

    Only ranks whose tokens are their own write: those of the data x context group on the last pipeline stage with
    tensor rank 0. `part` counts them from 0.
    """

    def __init__(self, dumps: Path, *, part: int, settings: DumpSettings) -> None:
        """dumps: RUN/dumps."""
        folder = step_folder(dumps, settings.step)
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._path = folder / f"rank_{part}.parquet"
        self._temporary = self._path.with_suffix(".tmp")
        metadata = {VERSION_KEY: str(SCHEMA_VERSION).encode(), SETTINGS_KEY: settings.to_json().encode()}
        self._schema = SCHEMA.with_metadata(metadata)
        self._writer = pq.ParquetWriter(
            self._temporary,
            self._schema,
            compression="zstd",
            # A list of columns is allowed, though pyarrow's types do not say so.
            use_dictionary=[item.name for item in SCHEMA if pa.types.is_integer(item.type)],  # type: ignore[arg-type]
            write_page_checksum=True,
        )

    def add(self, *, update: int, epoch: int, seed: int, micro_batch: MicroBatch, stats: TokenStats) -> None:
        """The response tokens of one micro-batch; copies them to the host."""
        mask = micro_batch.response_mask
        assert micro_batch.old_logprobs is not None
        assert stats.alignment is not None and stats.sum_p2 is not None, "a dump needs second moments"
        tensors = {
            "sequence_id": micro_batch.sequence_ids,
            "position": micro_batch.position_ids,
            "token_id": micro_batch.labels,
            "response_length": micro_batch.response_lengths,
            "logprob": stats.logprobs,
            "old_logprob": micro_batch.old_logprobs,
            "rollout_logprob": micro_batch.rollout_logprobs,
            "reference_logprob": micro_batch.reference_logprobs,
            "entropy": stats.entropy,
            "old_entropy": micro_batch.old_entropy,
            "alignment": stats.alignment,
            "sum_p2": stats.sum_p2,
            "advantage": micro_batch.advantages,
            "entropy_coef": micro_batch.entropy_coefs,
        }
        size = int(mask.sum())
        constants = {"step": self._settings.step, "update": update, "epoch": epoch, "seed": seed}
        arrays = [
            pa.repeat(pa.scalar(constants[item.name], item.type), size)
            if item.name in constants
            else _column(tensors[item.name], mask, item.type, size)
            for item in SCHEMA
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> Path:
        """Ends the file and gives it its name; returns that."""
        self._writer.close()
        self._temporary.replace(self._path)
        return self._path

    def __enter__(self) -> RolloutDump:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Closes; a step that failed leaves no file, for its last updates would be missing without a trace."""
        if error is None:
            self.close()
        else:
            self._writer.close()
            self._temporary.unlink()


def _column(values: Tensor | None, mask: Tensor, kind: pa.DataType, size: int) -> pa.Array:
    if values is None:
        return pa.nulls(size, kind)
    return pa.array(values.detach()[mask].cpu().numpy()).cast(kind)
