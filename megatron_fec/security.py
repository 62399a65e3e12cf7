"""What the project trusts, as checks: whose checkpoint is loaded, and where secrets may stand (docs/security.md)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from megatron_fec.errors import ConfigError

SECRET_NAME = re.compile(r"(^|_)(API_?KEY|ACCESS_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
CREDENTIALS_IN_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s@]+@", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; a shorter value, such as a number, may stand in a setting by chance


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose names are those of secrets."""
    return {name: value for name, value in environment.items() if SECRET_NAME.search(name.upper())}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that needs no secret."""
    secrets = secrets_of(environment)
    return {name: value for name, value in environment.items() if name not in secrets}


def refuse_secrets(settings: object) -> None:
    """Raises ConfigError, which does not show it, if a setting holds a secret: settings are printed and saved.

    settings: a dataclass of settings, nested as they are. A secret is a password in a URL, or the value of a variable
    of the environment that is named like one.
    """
    secrets = {name: value for name, value in secrets_of(os.environ).items() if _is_telling(value)}
    for key, text in _texts(settings, ""):
        if CREDENTIALS_IN_URL.search(text):
            raise ConfigError(
                f"{key} holds a URL with a user's name or password; settings are printed and saved in the run folder. "
                "Take it out: a hub reads HF_TOKEN from the environment, and a file can be fetched beforehand."
            )
        for name, value in secrets.items():
            if value in text:
                raise ConfigError(
                    f"{key} holds the value of the environment variable {name}; settings are printed and saved in the "
                    "run folder. Take it out: what needs the secret reads it from the environment."
                )


def check_checkpoint(checkpoint: Path, *, user: int | None = None) -> None:
    """Raises ConfigError if a stranger may have written RUN/checkpoints/step_NNNNNN.

    Its files, itself and the two folders above must belong to this user or to root, and not be writable for everyone.
    Links are followed: what counts is the file that is read. The group may write: teams share run folders.
    user: the number of this user where it is not that of the process.
    """
    own, checkpoint = os.geteuid() if user is None else user, checkpoint.absolute()
    for path in [checkpoint.parent.parent, checkpoint.parent, checkpoint, *sorted(checkpoint.rglob("*"))]:
        where = f"trainer.resume: {path}" + (f", which is {path.resolve()}," if path.is_symlink() else "")
        try:
            found = path.stat()
        except OSError as error:
            raise ConfigError(f"{where} cannot be read: {error.strerror}. Mend or remove it.") from error
        if found.st_uid not in (own, 0):
            raise ConfigError(
                f"{where} belongs to user {found.st_uid}, not to you ({own}) or root, and loading a checkpoint can run "
                f"code of the one who wrote it. If you trust that user, load a copy of your own: "
                f"cp -rL {checkpoint.parent.parent} COPY."
            )
        if found.st_mode & stat.S_IWOTH and not _is_sticky_folder(found.st_mode):
            raise ConfigError(
                f"{where} can be written by every user of this machine, and loading a checkpoint can run code of the one "
                f"who wrote it. If nobody has touched it: chmod -R o-w {checkpoint.parent.parent}."
            )


def _is_sticky_folder(mode: int) -> bool:
    return stat.S_ISDIR(mode) and bool(mode & stat.S_ISVTX)


def _is_telling(value: str) -> bool:
    """Not a number or a path: FEC_KEY_FILE=/etc/key names a file, and paths stand in many settings."""
    return len(value) >= SHORTEST_SECRET and not value.startswith(("/", "~", "."))


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested dataclasses, mappings and lists; a mapping's keys are texts too."""
    if isinstance(value, str):
        yield key, value
    elif is_dataclass(value):
        for item in fields(value):
            yield from _texts(getattr(value, item.name), f"{key}.{item.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(str(name), key)
            yield from _texts(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item, key)
