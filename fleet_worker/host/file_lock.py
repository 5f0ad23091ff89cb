"""A name that only one process of this host can hold: a locked file, which the system unlocks when its holder ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
import zlib
from pathlib import Path
from typing import IO

from fleet_worker.errors import ConfigurationError

LOOKS_END_WITHIN = (0.02, 0.08, 0.2)
"""Seconds between the tries to hold a name."""


class Held(Exception):
    """Another process holds the name: `pid`, or None if that is unknown."""

    def __init__(self, path: Path, pid: int | None) -> None:
        super().__init__(f"{path.name} is held by process {pid or '(unknown)'}")
        self.pid = pid


def file_name(name: str) -> str:
    """Return a name for a file that no other name has, also on macOS, where names of different case are one file."""
    if re.fullmatch(r"[a-z0-9@._-]*", name):
        return name
    return f"{name}~{zlib.crc32(name.encode()):08x}"


def hold(path: Path) -> IO[str]:
    """Hold a name until the returned file is closed. Child processes do not inherit it.

    Raises:
        Held: another process holds it.
        ConfigurationError: the file cannot be created.
    """
    file = open_lock(path)
    if not _lock(file):
        with file:
            raise Held(path, _pid(file)) from None
    file.truncate(0)
    with contextlib.suppress(OSError):  # on a full disk nobody can know who holds it
        os.write(file.fileno(), str(os.getpid()).encode())
    return file


def _lock(file: IO[str]) -> bool:
    """Lock it unless another process holds it. One that only asks for its `holder` has a lock too, for a moment."""
    for pause in (*LOOKS_END_WITHIN, None):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if pause:
            time.sleep(pause)
    return False


def open_lock(path: Path) -> IO[str]:
    """Open a lock file, and create it and its folder if needed. It is not locked yet, and is never removed.

    Raises:
        ConfigurationError: the file cannot be created.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path.open("a+", encoding="ascii", errors="replace")  # "w" would empty it
    except OSError as error:
        raise ConfigurationError(f"state_dir: {path} cannot be written: {error.strerror}") from None


def holder(path: Path) -> int | None:
    """Return the id of the process that holds a name; None if it is free.

    Raises:
        ConfigurationError: the file cannot be read, as one that root has created.
    """
    try:
        file = path.open(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"state_dir: {path} cannot be read: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _pid(file)
    return None


def _pid(file: IO[str]) -> int | None:
    file.seek(0)
    text = file.read(20)
    return int(text) if text.isdigit() else None  # the holder writes it after it has locked the file
