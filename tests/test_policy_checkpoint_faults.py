"""What happens to checkpoints that a disk spoils, and to saves that fail on one rank: on real files, by real limits."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from policy_fixtures import fp32, make_groups, nll_step, on_layout, pack_for, save_model
from ranks import run_on_ranks

from megatron_fec.config import ConfigError
from megatron_fec.policy.checkpoint import TrainerState, load_checkpoint
from megatron_fec.policy.checkpoint_files import (
    MANIFEST,
    STATE_FILE,
    CheckpointError,
    damage,
    find_checkpoints,
    newest_whole,
    set_aside,
)
from megatron_fec.policy.checkpoint_save import PROBE_BYTES, save_checkpoint
from megatron_fec.policy.step import Policy

FILE_LIMIT = PROBE_BYTES + 1  # bytes; the tensors' files are longer
NOBODY = 65534


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen3")


def state(step: int) -> TrainerState:
    return TrainerState(step=step, consumed_samples=0, weight_version=step, schedule={})


@pytest.fixture(scope="module")
def saved(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """step_000002 and step_000003 of two ranks that share the tensors."""
    directory = tmp_path_factory.mktemp("saved")

    def job(policy: Policy) -> None:
        (batches,) = pack_for(policy, make_groups())
        for step in (2, 3):
            nll_step(policy, batches)
            save_checkpoint(policy, directory, state(step), keep=2)

    on_layout(model_dir, job, fp32(tensor_parallel=2))
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


# ------------------------------------------------------------------ files that a disk spoils


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


SPOIL: dict[str, Callable[[Path], None]] = {
    "flipped": flip_a_bit,
    "cut off": cut_off,
    "empty": empty,
    "missing": Path.unlink,
}


def chosen(directory: Path) -> tuple[str, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones."""
    checkpoint, damaged = newest_whole(directory)
    assert checkpoint is not None
    return checkpoint.name, [f"{path.name}: {fault}" for path, fault in damaged.items()]


def test_every_file_is_guarded(directory: Path) -> None:
    """Each file of the newest checkpoint spoiled in each way: it is named, and the older checkpoint is used."""
    newest = directory / "step_000003"
    spoiled = [(path, kind) for path in sorted(newest.iterdir()) for kind in SPOIL]

    def job(rank: int) -> list[tuple[str, list[str]]]:
        found = [chosen(directory)]
        for path, kind in spoiled:
            content = path.read_bytes()
            dist.barrier()
            if rank == 0:
                SPOIL[kind](path)
            dist.barrier()
            found.append(chosen(directory))
            dist.barrier()
            if rank == 0:
                path.write_bytes(content)
        dist.barrier()
        return [*found, chosen(directory)]

    first, second = run_on_ranks(2, job)
    assert first == second
    assert first[0] == first[-1] == ("step_000003", [])
    assert {path.name[:4] for path, _ in spoiled} >= {"__0_", "__1_"}  # tensors of both ranks
    for (path, kind), (name, faults) in zip(spoiled, first[1:-1], strict=True):
        assert name == "step_000002", (path, kind)
        if path.name != MANIFEST:
            fault = "is missing" if kind == "missing" else "does not match its checksum"
            assert faults == [f"step_000003: {path.name} {fault}"]
        else:
            assert len(faults) == 1 and faults[0].startswith("step_000003: ")


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_a_list_that_was_cut_between_two_lines(directory: Path, kept: int) -> None:
    manifest = directory / "step_000003" / MANIFEST
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:kept]))
    assert run_on_ranks(1, lambda rank: chosen(directory)) == [
        ("step_000002", [f"step_000003: {MANIFEST} is cut off"])
    ]


@pytest.mark.parametrize("line", ["no digest", "0" * 63 + "  common.pt", "0" * 64 + "  ../common.pt", "\xff"])
def test_a_list_with_a_line_that_is_none(directory: Path, line: str) -> None:
    manifest = directory / "step_000003" / MANIFEST
    manifest.write_text(f"{line}\n{manifest.read_text()}")
    assert run_on_ranks(1, lambda rank: damage(manifest.parent)) == [f"{MANIFEST} is not a list of checksums"]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_the_list_is_one_that_sha256sum_reads(saved: Path) -> None:
    for checkpoint in find_checkpoints(saved):
        done = subprocess.run(
            ["sha256sum", "--check", "--strict", MANIFEST], cwd=checkpoint, capture_output=True
        )
        assert done.returncode == 0, done.stdout
        assert done.stdout.count(b": OK") == len(list(checkpoint.iterdir())) - 1


def test_none_whole_is_an_error_on_all_ranks(directory: Path) -> None:
    for checkpoint in find_checkpoints(directory):
        flip_a_bit(checkpoint / STATE_FILE)

    def job(rank: int) -> str:
        with pytest.raises(ConfigError) as error:
            newest_whole(directory)
        return str(error.value)

    first, second = run_on_ranks(2, job)
    fault = f"{STATE_FILE} does not match its checksum"
    assert first == second
    assert f"is whole (step_000003: {fault}; step_000002: {fault}). Put one back, or move that" in first


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert run_on_ranks(2, lambda rank: newest_whole(tmp_path / "none")) == [(None, {}), (None, {})]


@pytest.fixture
def reachable(directory: Path) -> Iterator[Path]:
    """A copy that any user can get at: pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(directory, Path(folder, "checkpoints")))
        for path in (copy.parent, copy):
            path.chmod(0o755)
        yield copy


@pytest.mark.parametrize(
    ("closed", "message"),
    [
        (f"step_000003/{STATE_FILE}", f"step_000003/{STATE_FILE} cannot be read. Check its permissions."),
        ("", "checkpoints cannot be read: Permission denied. Check its permissions."),
    ],
    ids=["file", "folder"],
)
def test_what_may_not_be_read_is_no_damage(reachable: Path, closed: str, message: str) -> None:
    """And no reason to begin anew."""
    (reachable / closed).chmod(0)

    def job(rank: int) -> str:
        with pytest.raises(ConfigError) as error, not_root():
            newest_whole(reachable)
        return str(error.value)

    first, second = run_on_ranks(2, job)
    assert first == second
    assert first.endswith(message)


def test_damaged_checkpoints_are_set_aside_and_do_not_count(model_dir: Path, directory: Path) -> None:
    """Otherwise the damaged step 3 would be the newest, and the whole step 2 be removed after the next save."""
    flip_a_bit(directory / "step_000003" / STATE_FILE)
    (directory / "damaged_step_000003").mkdir()  # of an earlier time

    def job(policy: Policy) -> None:
        checkpoint, damaged = newest_whole(directory)
        assert checkpoint is not None
        set_aside(damaged)
        load_checkpoint(policy, checkpoint)
        save_checkpoint(policy, directory, state(3), keep=2)

    on_layout(model_dir, job, fp32(tensor_parallel=2))
    assert sorted(path.name for path in directory.iterdir()) == [
        "damaged_step_000003",
        "step_000002",
        "step_000003",
    ]
    assert (directory / "damaged_step_000003" / STATE_FILE).is_file()
    assert run_on_ranks(1, lambda rank: chosen(directory)) == [("step_000003", [])]


# ------------------------------------------------------------------ saves that fail


@contextmanager
def not_root() -> Iterator[None]:
    """root may read and write whatever the modes say."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond that: the kernel refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing_save(policy: Policy, directory: Path, step: int) -> str:
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(policy, directory, state(step), keep=2)
    return str(error.value)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_on_one_rank_fails_on_all(model_dir: Path, directory: Path, failing: int) -> None:
    def job(policy: Policy) -> str:
        limit = FILE_LIMIT if dist.get_rank() == failing else resource.RLIM_INFINITY
        with file_limit(limit):
            text = failing_save(policy, directory, 4)
        dist.barrier()
        left = sorted(path.name for path in directory.iterdir())
        assert left == ["step_000002", "step_000003"]
        assert chosen(directory) == ("step_000003", [])
        save_checkpoint(policy, directory, state(4), keep=2)  # with room again
        return text

    first, second = on_layout(model_dir, job, fp32(tensor_parallel=2))
    for text in (first, second):
        assert f"the checkpoint {directory / 'step_000004'} could not be written: rank {failing}: " in text
        assert f"/__{failing}_" in text and ".distcp: File too large. Its tensors take " in text
        assert "bytes are free. Earlier checkpoints are untouched: mend the cause and start" in text
    assert [path.name for path in find_checkpoints(directory)] == ["step_000003", "step_000004"]


def test_a_folder_that_may_not_be_written(model_dir: Path, reachable: Path) -> None:
    directory = reachable
    directory.chmod(0o555)

    def job(policy: Policy) -> str:
        with not_root():
            return failing_save(policy, directory, 4)

    first, second = on_layout(model_dir, job, fp32(tensor_parallel=2))
    assert f"step_000004 could not be written: rank 0: {directory}/.writing_step_000004_" in first
    assert ": Permission denied. " in first and ": Permission denied. " in second
    assert [path.name for path in find_checkpoints(directory)] == ["step_000002", "step_000003"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk(model_dir: Path, small_disk: Path) -> None:
    directory = small_disk / "checkpoints"

    def job(policy: Policy) -> list[str]:
        save_checkpoint(policy, directory, state(1), keep=2)
        (small_disk / "other").write_bytes(bytes(free_bytes(small_disk) - 2 * PROBE_BYTES))
        texts = [failing_save(policy, directory, 2)]
        (small_disk / "more").write_bytes(bytes(free_bytes(small_disk)))  # not a block is left
        texts.append(failing_save(policy, directory, 2))
        return texts

    ((midway, at_once),) = on_layout(model_dir, job)
    assert ".distcp: No space left on device. Its tensors take " in midway
    assert f"{2 * PROBE_BYTES:,} bytes are free" in midway
    assert "could not be written: rank 0: " in at_once and "No space left on device" in at_once
    assert run_on_ranks(1, lambda rank: chosen(directory)) == [("step_000001", [])]
    assert [path.name for path in directory.iterdir()] == ["step_000001"]


def free_bytes(place: Path) -> int:
    return shutil.disk_usage(place).free
