"""RUN/engines: where servers leave their addresses, and the key that trainer and servers of one job share."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

KEY_FILE = "key"
KEY_BYTES = 32


class FolderError(RuntimeError):
    """What a person must put right in RUN/engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAddress:
    """One server that answers."""

    name: str  # HOST:PORT as it was told to bind: a server that is started again has it again
    host: str  # address that the trainer connects to
    port: int
    node: str  # for messages
    instance: str  # another one each time the server starts
    key_id: str  # of the job's key; files of an earlier job have another


def key_id(key: bytes) -> str:
    """Names a key without telling it."""
    return hashlib.sha256(b"fec key id" + key).hexdigest()[:16]


def make_key(folder: Path) -> bytes:
    """The job's key; the first process that asks makes it. Only the user can read the file."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / KEY_FILE
    if not path.exists():
        writing = folder / f".key_{secrets.token_hex(8)}"
        with open(os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was first: its key is the key
            os.link(writing, path)
        writing.unlink()
    return read_key(folder)


def read_key(folder: Path) -> bytes:
    """The job's key, refused where others could have read or written it."""
    path = folder / KEY_FILE
    try:
        status = path.stat()
        text = path.read_text().strip()
    except OSError as error:
        raise FolderError(
            f"{path} cannot be read: {error.strerror}. The launcher makes it (mode 600) before it starts servers."
        ) from error
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise FolderError(
            f"{path} must belong to this user with mode 600, and has mode {stat.S_IMODE(status.st_mode):o} of user "
            f"{status.st_uid}. Remove it; the next start makes another."
        )
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) < KEY_BYTES:
        raise FolderError(
            f"{path} must hold at least {2 * KEY_BYTES} hexadecimal digits. Remove it; the next start makes another."
        )
    return key


def write_address(folder: Path, address: EngineAddress) -> Path:
    """The server's file, whole or not at all; it replaces that of an earlier start."""
    path = folder / f"{address.name.replace(':', '_')}.json"
    writing = folder / f".{path.name}_{address.instance}"
    writing.write_text(json.dumps(asdict(address)))
    writing.rename(path)
    return path


def read_addresses(folder: Path, key: bytes) -> list[EngineAddress]:
    """The servers of this key, by name; files of another key are left alone."""
    found = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            address = EngineAddress(**json.loads(path.read_text()))
        except FileNotFoundError:
            continue  # a server that ends takes its file away
        except (OSError, ValueError, TypeError) as error:
            raise FolderError(f"{path} is not the file of an engine: {error}. Remove it.") from error
        if address.key_id == key_id(key):
            found.append(address)
    return found
