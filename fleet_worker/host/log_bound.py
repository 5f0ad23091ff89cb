"""Keeps the log of a service of launchd within bounds, which nothing else does; journald does it for itself."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

MOST_BYTES = 50_000_000
"""Of a log, and of the older part beside it."""
LOOK_EVERY = 60.0
_OUTPUT = 1


def bound_output(path: Path, most: int = MOST_BYTES, look_every: float = LOOK_EVERY) -> threading.Thread | None:
    """If the output of this process is appended to that file, as launchd does, keep it within bounds from now on, in a
    thread that is returned. Any other output is left alone, and None is returned."""
    try:
        mine = os.fstat(_OUTPUT)
        is_ours = os.path.samestat(mine, path.stat()) and stat.S_ISREG(mine.st_mode)
        appends = fcntl.fcntl(_OUTPUT, fcntl.F_GETFL) & os.O_APPEND  # else it would begin with a hole
    except OSError:
        return None
    if not is_ours or not appends:
        return None
    thread = threading.Thread(target=_watch, args=(path, most, look_every), name="log bound", daemon=True)
    thread.start()
    return thread


def _watch(path: Path, most: int, look_every: float) -> None:
    while True:
        try:
            if path.stat().st_size > most:
                turn_over(path)
        except OSError as error:  # as a full disk; there may be room the next time
            log.warning("the log %s has more than %d bytes, and cannot be moved: %s", path, most, error.strerror)
        time.sleep(look_every)


def turn_over(path: Path) -> None:
    """Move what is in the file to another one, NAME.1, which this user alone may read, and go on with an empty one.

    All processes keep writing to the same file; lines that they write in this moment may be lost. Raises `OSError`.
    """
    older = path.with_name(f"{path.name}.1")
    older.unlink(missing_ok=True)  # first, as the disk may be full
    with path.open("rb") as source, open(os.open(older, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
        shutil.copyfileobj(source, target)
    os.truncate(path, 0)
