"""One holder of a name on this host: a locked file, which the system unlocks however its holder ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from fleet_worker.errors import ConfigurationError


class Held(Exception):
    """Somebody else holds the name: the process `pid`, or None if it does not say."""

    def __init__(self, path: Path, pid: int | None) -> None:
        super().__init__(f"{path.name} is held by process {pid or '(unknown)'}")
        self.pid = pid


def hold(path: Path) -> IO[str]:
    """Hold a name until the returned file is closed. No child inherits it.

    Raises:
        Held: another process holds it.
        ConfigurationError: there can be no such file.
    """
    file = open_lock(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            raise Held(path, _pid(file)) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def open_lock(path: Path) -> IO[str]:
    """Open a lock file, and make it and its folder if need be. It is not held yet, and never removed.

    Raises:
        ConfigurationError: there can be no such file.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path.open("a+", encoding="ascii")  # "w" would empty it
    except OSError as error:
        raise ConfigurationError(f"state_dir: {path} cannot be written: {error.strerror}") from None


def holder(path: Path) -> int | None:
    """Return the process that holds a name; None if nobody does."""
    try:
        file = path.open(encoding="ascii")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _pid(file)
    return None


def _pid(file: IO[str]) -> int | None:
    file.seek(0)
    text = file.read()
    return int(text) if text.isdigit() else None  # it holds the lock for a moment before it says who it is
