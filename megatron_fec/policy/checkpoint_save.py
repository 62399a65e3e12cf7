"""Writing a checkpoint on all ranks, atomically and, when asked, in the background.

It is written under a temporary name, synced to disk and renamed when every rank has finished, so a folder named
step_NNNNNN is whole unless the disk spoils it later, which its checksums show. A fault of one rank is raised by all.
"""

from __future__ import annotations

import io
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_fec.policy.checkpoint import (
    EXPERT_SIZES,
    MODEL_SIZES,
    TrainerState,
    is_distributed,
    rng_state,
    sharded_state,
)
from megatron_fec.policy.checkpoint_files import (
    STATE_FILE,
    CheckpointError,
    find_checkpoints,
    on_every_rank,
    sync_folder,
    synced_digest,
    write_manifest,
    write_synced,
)
from megatron_fec.policy.checkpoint_tensors import TensorWrite, plan_write
from megatron_fec.policy.step import Policy

UNFINISHED = (".writing_", ".removing_")  # folders of a process that was killed at it
PROBE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """A checkpoint on its way to the disk."""

    directory: Path
    name: str  # step_NNNNNN
    writing: Path  # what it is called until it is whole
    tensors: TensorWrite
    digests: dict[str, str]  # of the files that are there already, of all ranks
    num_bytes: int  # of all ranks' tensors
    keep: int


class Saver:
    """Writes checkpoints, one at a time; every method is for all ranks to call."""

    def __init__(self) -> None:
        self._background: AsyncCallsQueue | None = None
        self._finished: list[Path] = []
        self._started = 0.0
        self.slowest = 0.0  # seconds that one took from the call of save() until it was whole

    def save(
        self, policy: Policy, directory: Path, state: TrainerState, *, keep: int, in_background: bool
    ) -> None:
        """Writes `directory/step_NNNNNN`, and removes all but the newest `keep`.

        in_background: the policy may change when this returns; finished() tells when the checkpoint is there.
        """
        self._finished = self.finished(wait=True)
        self._started = time.monotonic()
        save = _begin(policy, directory, state, keep=keep)
        if in_background:
            self._background = AsyncCallsQueue()
            request = save.tensors.request
            request.add_finalize_fn(partial(self._finish, save))
            self._background.schedule_async_request(request)
        else:
            with _explained(save.directory, save.name, save.num_bytes):
                on_every_rank(save.tensors.run)
            self._finish(save)

    def finished(self, *, wait: bool) -> list[Path]:
        """The checkpoints that have become whole since the last call; CheckpointError when one could not be written."""
        if self._background is not None:
            queue = self._background
            try:
                queue.maybe_finalize_async_calls(blocking=wait)
            finally:
                if queue.get_num_unfinalized_calls() == 0:
                    self._background = None
        found, self._finished = self._finished, []
        return found

    def _finish(self, save: Save) -> None:
        self._finished.append(_finish(save))
        self.slowest = max(self.slowest, time.monotonic() - self._started)


def save_checkpoint(policy: Policy, directory: Path, state: TrainerState, *, keep: int) -> Path:
    """Writes `directory/step_NNNNNN` on all ranks, atomically, and removes all but the newest `keep`."""
    saver = Saver()
    saver.save(policy, directory, state, keep=keep, in_background=False)
    (saved,) = saver.finished(wait=True)
    return saved


def _begin(policy: Policy, directory: Path, state: TrainerState, *, keep: int) -> Save:
    """Fixes what is saved: all but the tensors is written when this returns."""
    name = f"step_{state.step:06d}"
    with _explained(directory, name, 0):
        writing, *_ = on_every_rank(lambda: _make_folder(directory, name) if dist.get_rank() == 0 else None)
        assert writing is not None
        tensors = plan_write(sharded_state(policy, is_loading=False), writing)
        written = on_every_rank(lambda: (tensors.num_bytes, _write_own_files(policy, state, writing)))
    return Save(
        directory=directory,
        name=name,
        writing=writing,
        tensors=tensors,
        digests={name: digest for _, digests in written for name, digest in digests.items()},
        num_bytes=sum(num_bytes for num_bytes, _ in written),
        keep=keep,
    )


def _finish(save: Save) -> Path:
    """Makes the written files a checkpoint."""
    with _explained(save.directory, save.name, save.num_bytes):
        digests = dict(save.digests)
        for written in on_every_rank(save.tensors.digests):
            digests |= written
        for finalize in save.tensors.finalize_fns:
            finalize()
        on_every_rank(lambda: _publish(save, digests) if dist.get_rank() == 0 else None)
    return save.directory / save.name


def _make_folder(directory: Path, name: str) -> Path:
    """An empty folder that no writer of an earlier start can know, after removing what those have left."""
    is_first = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    if is_first:
        sync_folder(directory.parent)
    _remove_unfinished(directory)
    writing = directory / f".writing_{name}_{uuid.uuid4().hex[:8]}"
    writing.mkdir()
    probe = (
        writing / "probe"
    )  # megatron-core writes its first file where other ranks already wait for this one
    probe.write_bytes(bytes(PROBE_BYTES))
    probe.unlink()
    return writing


def _remove_unfinished(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name.startswith(UNFINISHED):
            shutil.rmtree(path)


def _write_own_files(policy: Policy, state: TrainerState, writing: Path) -> dict[str, str]:
    """This rank's random states, and on rank 0 the trainer's state; digests by name."""
    rng_file = f"rng_{dist.get_rank():05d}.pt"
    buffer = io.BytesIO()  # through which an error keeps the operating system's words
    torch.save(rng_state(), buffer)
    digests = {rng_file: write_synced(writing / rng_file, buffer.getvalue())}
    if dist.get_rank() == 0:
        hf_config = policy.bridge.hf_config
        saved = {
            "trainer": asdict(state),
            "model": {n: getattr(hf_config, n) for n in MODEL_SIZES + EXPERT_SIZES if hasattr(hf_config, n)},
            "distributed_optimizer": is_distributed(policy),
            "world_size": dist.get_world_size(),
        }
        digests[STATE_FILE] = write_synced(writing / STATE_FILE, json.dumps(saved, indent=2).encode())
    return digests


def _publish(save: Save, digests: dict[str, str]) -> None:
    """Lists the checksums, gives the folder its name, and removes old checkpoints; for rank 0."""
    for path in save.writing.iterdir():  # what megatron-core wrote by itself on this rank
        if path.name not in digests:
            digests[path.name] = synced_digest(path)
    write_manifest(save.writing, digests)
    final = save.directory / save.name
    replaced = [_moved_aside(final)] if final.exists() else []  # removed when the new one is in its place
    save.writing.rename(final)
    sync_folder(save.directory)
    for old in replaced + [_moved_aside(path) for path in find_checkpoints(save.directory)[: -save.keep]]:
        shutil.rmtree(old)


def _moved_aside(checkpoint: Path) -> Path:
    """Under a name that no start takes for a checkpoint, should this process be killed while it removes it."""
    return checkpoint.rename(checkpoint.with_name(f".removing_{checkpoint.name}_{uuid.uuid4().hex[:8]}"))


@contextmanager
def _explained(directory: Path, name: str, num_bytes: int) -> Iterator[None]:
    """Adds to a fault what a user needs to mend it, and removes the half-written folder: it may have filled the disk."""
    try:
        yield
    except CheckpointError as error:
        if dist.get_rank() == 0:
            with suppress(OSError):
                _remove_unfinished(directory)
        raise CheckpointError(
            f"the checkpoint {directory / name} could not be written: {error}. {_room(directory, num_bytes)}"
            "Earlier checkpoints are untouched: mend the cause and start the same command again."
        ) from error


def _room(directory: Path, num_bytes: int) -> str:
    """Bytes needed and free, as far as they are known."""
    needed = f"Its tensors take {num_bytes:,} bytes. " if num_bytes else ""
    try:
        return f"{needed}{shutil.disk_usage(directory).free:,} bytes are free. "
    except OSError:
        return needed
