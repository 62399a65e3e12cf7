"""The files of checkpoints: their checksums, which of the folders are whole, and steps that all ranks end alike.

A checkpoint holds SHA256SUMS, readable by `sha256sum --check`, with a line for every other file; the trainer's state,
written last, is its last line, so a list that was cut off is noticed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_fec.config import ConfigError

STEP_NAME = re.compile(r"step_(\d{6,})")
STATE_FILE = "trainer_state.json"
MANIFEST = "SHA256SUMS"
MANIFEST_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")
READERS = 4  # files that a rank reads at the same time

Result = TypeVar("Result")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; raised by all ranks alike."""


def find_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    try:
        found = [path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:  # Path.glob would find nothing, and the run begin anew
        raise ConfigError(
            f"trainer.resume: {directory} cannot be read: {error.strerror}. Check its permissions."
        ) from error
    return sorted(found, key=lambda path: int(path.name[5:]))


def on_every_rank(work: Callable[[], Result]) -> list[Result]:
    """What work returns, by rank. If it raises on any of them, all raise a CheckpointError that names the first."""
    result: Result | None = None
    fault: str | None = None
    own: Exception | None = None
    try:
        result = work()
    except Exception as error:  # whatever a file system or a serializer says, the other ranks must hear of it
        own, fault = error, reason(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (result, fault))
    for rank, (_, text) in enumerate(everyone):
        if text is not None:
            raise CheckpointError(f"rank {rank}: {text}") from own
    return [result for result, _ in everyone]


def reason(error: BaseException) -> str:
    """What an error says; the operating system's words where torch wraps them in its own."""
    if isinstance(error, CheckpointError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None or cause.strerror is None:
        return str(error)
    return f"{cause.filename}: {cause.strerror}" if cause.filename else cause.strerror


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def synced_digest(path: Path) -> str:
    """The SHA-256 of a file that is on disk when this returns; it is computed while the disk still writes."""
    with path.open("rb") as file, ThreadPoolExecutor(1) as disk:
        synced = disk.submit(os.fsync, file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        synced.result()
    return digest


def write_synced(path: Path, content: bytes) -> str:
    """Writes a small file; its digest."""
    path.write_bytes(content)
    return synced_digest(path)


def write_manifest(folder: Path, digests: dict[str, str]) -> None:
    """Lists the files' digests, the trainer's state last, and makes the folder survive a power cut."""
    names = sorted(digests, key=lambda name: (name == STATE_FILE, name))
    write_synced(folder / MANIFEST, "".join(f"{digests[name]}  {name}\n" for name in names).encode())
    sync_folder(folder)


def read_manifest(checkpoint: Path) -> dict[str, str]:
    """The digest of each file by name. ValueError says what is wrong with the list."""
    path = checkpoint / MANIFEST
    with _reading(path):
        text = path.read_text(encoding="ascii", errors="replace")
    digests = {}
    for line in text.splitlines():
        match = MANIFEST_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{MANIFEST} is not a list of checksums")
        digests[match[2]] = match[1]
    if list(digests)[-1:] != [STATE_FILE] or not text.endswith("\n"):
        raise ValueError(f"{MANIFEST} is cut off")
    return digests


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, the same words on every rank; None when it is whole.

    Every rank reads its share. A file that may not be read is no damage: ConfigError.
    """
    (manifest, *_) = _agreed(lambda: read_manifest(checkpoint) if dist.get_rank() == 0 else {})
    if isinstance(manifest, str):
        return manifest
    names = sorted(manifest)
    share = names[dist.get_rank() :: dist.get_world_size()]

    def check_share() -> None:
        with ThreadPoolExecutor(READERS) as pool:
            for name, digest in zip(
                share, pool.map(lambda name: _digest(checkpoint / name), share), strict=True
            ):
                if digest != manifest[name]:
                    raise ValueError(f"{name} does not match its checksum")

    return next((fault for fault in _agreed(check_share) if fault is not None), None)


def newest_whole(directory: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose files all match their checksums, and what is wrong with each newer one.

    The same on all ranks. ConfigError when there are checkpoints and none is whole: to begin anew is the user's decision.
    """
    box = [
        find_checkpoints(directory)
    ]  # one rank's view: folders of a network are not the same everywhere at once
    dist.broadcast_object_list(box)
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(box[0]):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint, damaged
        damaged[checkpoint] = fault
    if damaged:
        faults = "; ".join(f"{checkpoint.name}: {fault}" for checkpoint, fault in damaged.items())
        raise ConfigError(
            f"trainer.resume: no checkpoint in {directory} is whole ({faults}). Put one back, "
            "or move that folder away to begin anew."
        )
    return None, {}


def set_aside(damaged: Iterable[Path]) -> None:
    """Renames damaged checkpoints on rank 0, so that they neither count as newest nor are lost."""
    if dist.get_rank() == 0:
        for checkpoint in damaged:
            aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def _digest(path: Path) -> str:
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what can go wrong with a file into ValueError, which is damage, or ConfigError, which the user can mend."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except PermissionError as error:
        raise ConfigError(f"trainer.resume: {path} cannot be read. Check its permissions.") from error
    except OSError as error:  # a disk that fails on this file
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error


def _agreed(work: Callable[[], Result]) -> list[Result | str]:
    """What work returns on each rank, or the words of its ValueError; a ConfigError of one is raised by all."""
    own: Result | str
    refusal: str | None = None
    try:
        own = work()
    except ConfigError as error:
        own, refusal = "", str(error)
    except ValueError as error:
        own = str(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (own, refusal))
    for _, text in everyone:
        if text is not None:
            raise ConfigError(text)
    return [result for result, _ in everyone]
