"""Signed messages, samples as bytes, and the folder in which servers are found."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fec.rollout.engine import PackedGroups
from megatron_fec.rollout.engine_folder import (
    EngineAddress,
    FolderError,
    key_id,
    make_key,
    read_addresses,
    read_key,
    write_address,
)
from megatron_fec.rollout.wire import Request, WireError, answer_mac, samples_from_bytes, samples_to_bytes
from megatron_fec.types import Sample

KEY = bytes(range(32))


def samples(*lengths: int) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            token_ids=tuple(range(length)),
            logprobs=tuple(-0.1 * i for i in range(length)),
            text="\u00e9\n" * length,
            is_truncated=length > 2,
            weight_version=4,
        )
        for length in lengths
    )


def test_samples_survive_the_wire_to_the_bit() -> None:
    rows = [(5, samples(1, 3)), (2, samples(2, 2)), (9, ())]
    packed = PackedGroups.of([row for _, row in rows], [place for place, _ in rows])
    groups, more = samples_from_bytes(samples_to_bytes(packed, {"steps": 7}))
    assert groups.samples() == rows and more == {"steps": 7}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.integers(0, 400))
def test_what_is_not_samples_is_refused(data: bytes | int) -> None:
    """Bytes at random, and answers that end early."""
    if isinstance(data, int):
        whole = samples_to_bytes(PackedGroups.of([samples(1, 3)], [0]), {})
        data = whole[: min(data, len(whole) - 1)]
    with pytest.raises(WireError, match="cannot be read"):
        samples_from_bytes(data)


def test_a_signature_covers_everything() -> None:
    request = Request(path="/generate", instance="i", session="s", count=3, body=b"{}")
    others = [
        replace(request, path="/quit"),
        replace(request, instance="j"),
        replace(request, session="t"),
        replace(request, count=4),
        replace(request, body=b"[]"),
    ]
    macs = {one.mac(KEY) for one in [request, *others]} | {request.mac(bytes(32))}
    assert len(macs) == len(others) + 2
    answers = {
        answer_mac(KEY, "a", 200, b"x"),
        answer_mac(KEY, "b", 200, b"x"),
        answer_mac(KEY, "a", 409, b"x"),
        answer_mac(KEY, "a", 200, b"y"),
    }
    assert len(answers) == 4 and not answers & macs


def test_the_key_is_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    key = make_key(folder)
    assert make_key(folder) == read_key(folder) == key and len(key) == 32
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["key"]
    assert key.hex() not in key_id(key)


def test_a_key_that_others_could_read_is_refused(tmp_path: Path) -> None:
    make_key(tmp_path)
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(FolderError, match=r"key must belong to this user with mode 600, and has mode 640"):
        read_key(tmp_path)
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "key").write_text("abc")
    with pytest.raises(FolderError, match="must hold at least 64 hexadecimal digits"):
        read_key(tmp_path)
    os.unlink(tmp_path / "key")
    with pytest.raises(FolderError, match=r"cannot be read: No such file.* The launcher makes it"):
        read_key(tmp_path)


def test_servers_of_another_key_are_left_alone(tmp_path: Path) -> None:
    def address(name: str, key: bytes) -> EngineAddress:
        return EngineAddress(
            name=name, host="10.0.0.1", port=6000, node="n1", instance="a", key_id=key_id(key)
        )

    write_address(tmp_path, address("10.0.0.1:6000", KEY))
    write_address(tmp_path, address("10.0.0.2:6000", bytes(32)))
    assert read_addresses(tmp_path, KEY) == [address("10.0.0.1:6000", KEY)]
    again = replace(address("10.0.0.1:6000", KEY), instance="b")
    write_address(tmp_path, again)
    assert read_addresses(tmp_path, KEY) == [again]
    (tmp_path / "10.0.0.3_6000.json").write_text("{")
    with pytest.raises(FolderError, match=r"10.0.0.3_6000.json is not the file of an engine"):
        read_addresses(tmp_path, KEY)
