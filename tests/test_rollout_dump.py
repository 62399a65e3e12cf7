"""Dumps of training tokens: what is written comes back bit for bit, and what cannot be right is named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dump_fixtures import LENGTHS, PLAN, SETTINGS, TOKENS, Trained, trained_step, write_dump
from torch import Tensor

from megatron_fec.config import ConfigError
from megatron_fec.dump_reader import Dump, dump_folders, read_dump
from megatron_fec.rollout_dump import SCHEMA, VERSION_KEY, DumpSettings, RolloutDump


@pytest.fixture(scope="module")
def step() -> list[Trained]:
    return trained_step()


@pytest.fixture
def folder(tmp_path: Path, step: list[Trained]) -> Path:
    return write_dump(tmp_path / "dumps", step)


def rewrite(path: Path, change: Callable[[dict[str, list]], object]) -> None:
    """The part with its columns, as lists, changed in place."""
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=table.schema), path)


def setting(column: str, row: int, value: object) -> Callable[[dict[str, list]], object]:
    return lambda columns: columns[column].__setitem__(row, value)


def rows_of(step: list[Trained], update: int) -> dict[tuple[int, int], dict[str, float]]:
    """(sequence, position) -> what the trainer held there, of one update."""
    rows = {}
    for one in step:
        if one.update != update:
            continue
        batch, stats = one.micro_batch, one.stats
        assert batch.old_logprobs is not None and batch.old_entropy is not None
        assert stats.alignment is not None and stats.sum_p2 is not None
        columns: dict[str, Tensor] = {
            "token_ids": batch.labels,
            "logprobs": stats.logprobs,
            "old_logprobs": batch.old_logprobs,
            "rollout_logprobs": batch.rollout_logprobs,
            "entropy": stats.entropy,
            "old_entropy": batch.old_entropy,
            "alignment": stats.alignment,
            "sum_p2": stats.sum_p2,
            "advantages": batch.advantages,
        }
        for t in batch.response_mask.nonzero()[:, 0].tolist():
            key = (int(batch.sequence_ids[t]), int(batch.position_ids[t]))
            assert key not in rows
            rows[key] = {name: values[t].item() for name, values in columns.items()}
    return rows


def test_a_dump_comes_back_bit_for_bit_in_the_order_of_sequences(folder: Path, step: list[Trained]) -> None:
    dump = read_dump(folder)
    assert dump.settings == SETTINGS and dump.faults == []
    assert [(u.update, u.epoch, u.seed) for u in dump.updates] == [
        (0, 0, 1000), (1, 0, 1001), (2, 1, 1002), (3, 1, 1003),
    ]  # fmt: skip
    for update in dump.updates:
        rows = rows_of(step, update.update)
        keys = list(zip(update.sequence_ids.tolist(), update.positions.tolist(), strict=True))
        assert keys == sorted(rows)
        for name in next(iter(rows.values())):
            assert getattr(update, name).tolist() == [rows[key][name] for key in keys], name
    assert sum(len(update.logprobs) for update in dump.updates) == TOKENS


def test_an_update_is_the_input_of_a_loss(folder: Path) -> None:
    update = read_dump(folder).updates[0]
    bounds = update.bounds(SETTINGS.weights, SETTINGS.lines)
    p = update.logprobs.exp()
    torch.testing.assert_close(bounds.eps_upper, 0.15 + 0.75 * (-0.2 * p + 0.45 - 0.15))
    torch.testing.assert_close(bounds.eps_lower, 0.15 + 0.1 * (-0.1 * p + 0.28 - 0.15))
    inputs = update.loss_inputs(bounds)
    lengths = [LENGTHS[i] for i in (0, 2, 4, 7)]
    assert inputs.update_lengths is not None and inputs.update_lengths.tolist() == lengths
    assert inputs.response_lengths is not None and inputs.response_starts is not None
    assert inputs.response_lengths.tolist() == [n for n in lengths for _ in range(n)]
    starts = inputs.response_starts.nonzero()[:, 0].tolist()
    assert starts == [0, 5, 6, 13]
    assert inputs.response_mask.all() and (inputs.max_response_tokens, inputs.seed) == (16, 1000)
    tokens = update.tokens(bounds)
    assert torch.equal(tokens.sequence_ids, update.sequence_ids) and tokens.seed == 1000


def test_what_a_run_has_not_is_null_and_what_it_has_comes_back(tmp_path: Path, step: list[Trained]) -> None:
    bare, full = [], []
    for one in step:
        batch = one.micro_batch
        assert batch.old_logprobs is not None
        extra = {
            "reference_logprobs": batch.old_logprobs - 0.5,
            "entropy_coefs": batch.old_logprobs * 0 + 0.25,
        }
        full.append(dataclasses.replace(one, micro_batch=dataclasses.replace(batch, **extra)))
        bare.append(dataclasses.replace(one, micro_batch=dataclasses.replace(batch, old_entropy=None)))
    update = read_dump(write_dump(tmp_path / "bare", bare)).updates[1]
    assert update.old_entropy is update.reference_logprobs is update.entropy_coefs is None
    update = read_dump(write_dump(tmp_path / "full", full)).updates[1]
    assert update.reference_logprobs is not None and update.entropy_coefs is not None
    assert torch.equal(update.reference_logprobs, update.old_logprobs - 0.5)
    assert set(update.entropy_coefs.tolist()) == {0.25}
    inputs = update.loss_inputs(update.bounds(SETTINGS.weights, SETTINGS.lines))
    assert inputs.reference_logprobs is not None and inputs.entropy_coefs is not None


def test_the_files_are_compressed_and_hold_their_schema(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0.parquet", "rank_1.parquet"]
    file = pq.ParquetFile(folder / "rank_0.parquet")
    assert file.schema_arrow.names == SCHEMA.names
    assert file.metadata.row_group(0).column(4).compression == "ZSTD"
    assert file.schema_arrow.metadata[VERSION_KEY] == b"1"


def test_a_part_has_its_name_only_when_it_is_whole(tmp_path: Path, step: list[Trained]) -> None:
    one = step[0]
    adding: dict[str, Any] = {name: getattr(one, name) for name in ("update", "epoch", "seed")}
    with RolloutDump(tmp_path, part=0, settings=SETTINGS) as dump:
        dump.add(**adding, micro_batch=one.micro_batch, stats=one.stats)
        assert list(tmp_path.rglob("*.parquet")) == []
    assert [path.name for path in tmp_path.rglob("*.*")] == ["rank_0.parquet"]
    with pytest.raises(RuntimeError), RolloutDump(tmp_path, part=1, settings=SETTINGS):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*.*")] == ["rank_0.parquet"]


def test_settings_survive_json() -> None:
    settings = dataclasses.replace(
        SETTINGS, options={"share": 1e-7, "points": [[0, 1.5], [1, 0.1]], "kind": None}
    )
    assert DumpSettings.from_json(settings.to_json()) == settings


def test_folders(tmp_path: Path, step: list[Trained]) -> None:
    run = tmp_path / "run"
    late = write_dump(run / "dumps", step, step=20)
    early = write_dump(run / "dumps", step, step=5)
    assert dump_folders(run) == dump_folders(run / "dumps") == [early, late]
    assert dump_folders(late) == [late]
    for nothing in (tmp_path, tmp_path / "nowhere", late / "rank_0.parquet"):
        with pytest.raises(ConfigError, match="holds no dump"):
            dump_folders(nothing)


def test_files_of_a_larger_layout_are_not_read(tmp_path: Path, step: list[Trained]) -> None:
    write_dump(tmp_path, step)
    on_one = [dataclasses.replace(one, rank=0) for one in step]
    folder = write_dump(tmp_path, on_one, parts=1)
    assert (folder / "rank_1.parquet").exists()
    assert sum(len(update.logprobs) for update in read_dump(folder).updates) == TOKENS


def test_another_schema_version_is_named(folder: Path) -> None:
    path = folder / "rank_1.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, VERSION_KEY: b"2"}), path)
    for skip in (False, True):
        with pytest.raises(
            ConfigError, match=r"rank_1.parquet has schema version 2, and .* reads version 1\."
        ):
            read_dump(folder, skip_corrupt=skip)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "is not a dump: it has no schema version"),
        ({VERSION_KEY: b"1"}, "has broken settings"),
        ({VERSION_KEY: b"1", b"megatron_fec.settings": b'{"lines": 3}'}, "has broken settings"),
    ],
)
def test_a_table_of_something_else(folder: Path, metadata: dict[bytes, bytes], message: str) -> None:
    path = folder / "rank_0.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    with pytest.raises(ConfigError, match=message):
        read_dump(folder)


def test_other_columns(folder: Path) -> None:
    path = folder / "rank_0.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["sum_p2"]), path)
    with pytest.raises(ConfigError, match="has other columns than schema version 1"):
        read_dump(folder, skip_corrupt=True)


def test_parts_of_two_runs(folder: Path, tmp_path: Path, step: list[Trained]) -> None:
    other = write_dump(tmp_path / "other", step, schedule="id")
    (other / "rank_1.parquet").replace(folder / "rank_1.parquet")
    with pytest.raises(ConfigError, match=r"rank_1.parquet has other settings than the parts before it"):
        read_dump(folder, skip_corrupt=True)


BAD_VALUES = [
    ("logprob", math.nan, "logprob=nan must be finite and at most 0"),
    ("logprob", 0.01, "logprob=0.009999999776482582 must be finite and at most 0"),
    ("old_logprob", -math.inf, "old_logprob=-inf must be finite"),
    ("rollout_logprob", 2.0, "rollout_logprob=2.0 must be finite and at most 0"),
    ("entropy", -0.5, "entropy=-0.5 must be finite and 0 or more"),
    ("old_entropy", math.inf, "old_entropy=inf must be finite"),
    ("old_entropy", None, "old_entropy=null must be finite"),
    ("alignment", math.nan, "alignment=nan must be finite"),
    ("advantage", math.inf, "advantage=inf must be finite"),
    ("sum_p2", 1.5, "sum_p2=1.5 must be in"),
    ("sum_p2", 0.0, "sum_p2=0.0 must be in"),
    ("reference_logprob", -1.0, ""),  # the other rows have none: they are the corrupt ones
    ("token_id", None, "token_id=null must be 0 or more"),
    ("sequence_id", -1, "sequence_id=-1 must be 0 or more"),
    ("response_length", 0, "response_length=0 must be 1 or more"),
    ("response_length", 8, "response_length=8, but the update has 7 rows of it"),
    ("step", 9, "step=9 must be 10, as the file's settings say"),
    ("position", 5, "this token is there twice"),
]


@pytest.mark.parametrize(("column", "value", "message"), BAD_VALUES)
def test_a_corrupt_row_is_named_and_skipped_only_when_asked(
    folder: Path, column: str, value: Any, message: str
) -> None:
    path = folder / "rank_1.parquet"  # sequence 4: 7 tokens in update 0, 7 in update 2
    rewrite(path, setting(column, 4, value))
    with pytest.raises(ConfigError, match=r"corrupt rows or files: .* Use --skip-corrupt") as caught:
        read_dump(folder)
    assert message in str(caught.value)
    if not message:
        assert "reference_logprob=null must be finite and at most 0" in str(caught.value)
        return
    assert "step_000010 has 1 corrupt rows or files: rank_1.parquet row " in str(caught.value)
    dump = read_dump(folder, skip_corrupt=True)
    assert len(dump.faults) == 1 and message in dump.faults[0]
    assert dump.faults[0].startswith(("rank_1.parquet row 4: ", "rank_1.parquet row 3: "))
    assert sum(len(update.logprobs) for update in dump.updates) == TOKENS - 1
    inputs = dump.updates[0].loss_inputs(dump.updates[0].bounds(SETTINGS.weights, SETTINGS.lines))
    assert inputs.update_lengths is not None and inputs.update_lengths.sum() == len(inputs.logprobs)


def test_rows_of_both_parts_are_counted_and_the_first_named(folder: Path) -> None:
    rewrite(folder / "rank_0.parquet", setting("logprob", 20, math.nan))
    for row in (0, 3, 13):
        rewrite(folder / "rank_1.parquet", setting("entropy", row, math.nan))
    with pytest.raises(ConfigError) as caught:
        read_dump(folder)
    text = str(caught.value)
    assert "has 4 corrupt rows or files: rank_0.parquet row 20: logprob=nan" in text
    assert "rank_1.parquet row 0: " in text and "rank_1.parquet row 3: " in text and "; ..." in text
    faults = read_dump(folder, skip_corrupt=True).faults
    assert [fault.split(":")[0] for fault in faults] == [
        "rank_0.parquet row 20", "rank_1.parquet row 0", "rank_1.parquet row 3", "rank_1.parquet row 13",
    ]  # fmt: skip


def test_a_lost_row_shows_in_the_lengths(folder: Path) -> None:
    def drop(columns: dict[str, list]) -> None:
        for values in columns.values():
            del values[2]

    rewrite(folder / "rank_1.parquet", drop)
    with pytest.raises(
        ConfigError, match=r"has 6 corrupt rows or files: .* response_length=7, but the update has 6"
    ):
        read_dump(folder)
    dump = read_dump(folder, skip_corrupt=True)
    assert sum(len(update.logprobs) for update in dump.updates) == TOKENS - 7
    assert 4 not in dump.updates[0].sequence_ids and 4 in dump.updates[2].sequence_ids


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def damaged(path: Path) -> None:
    """One bit flipped in the log-probs, where the compression does not notice."""
    column = pq.ParquetFile(path).metadata.row_group(0).column(SCHEMA.get_field_index("logprob"))
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, empty, damaged])
def test_an_unreadable_file_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "rank_1.parquet")
    with pytest.raises(ConfigError, match=r"has 1 corrupt rows or files: rank_1.parquet: not readable \("):
        read_dump(folder)
    check_without_rank_1(read_dump(folder, skip_corrupt=True))
    (folder / "rank_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"has no readable part: rank_0.parquet: not readable"):
        read_dump(folder, skip_corrupt=True)


def test_a_missing_part_is_named(folder: Path) -> None:
    (folder / "rank_1.parquet").unlink()
    with pytest.raises(ConfigError, match=r"has 1 corrupt rows or files: rank_1.parquet: missing"):
        read_dump(folder)
    check_without_rank_1(read_dump(folder, skip_corrupt=True))


def check_without_rank_1(dump: Dump) -> None:
    assert len(dump.faults) == 1
    held = [sum(LENGTHS[i] for batch in update[0] for i in batch) for update in PLAN]
    assert [len(update.logprobs) for update in dump.updates] == held * 2
