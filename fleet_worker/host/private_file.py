"""Files that only this user may read, and that are there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file, instead of one that is there; raises `OSError`."""
    with draft(path, content) as written:
        written.replace(path)


@contextmanager
def draft(path: Path, content: bytes) -> Iterator[Path]:
    """Write a file beside `path`, for the block to give it that name; else it is removed. Raises `OSError`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # with the mode 0600
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
