"""Standard output and standard error that lose what cannot be written, as on a full disk, instead of failing.

What serves must not end because its log cannot be written. Python would end it with the exit code 120, or a traceback.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any


class _Lossy(io.FileIO):
    def write(self, data: Any, /) -> int:
        """Return that all was written, if an error says otherwise."""
        with contextlib.suppress(OSError):
            if (written := super().write(data)) is not None:
                return written
        return memoryview(data).nbytes


def lose_what_cannot_be_written() -> None:
    """Replace the two streams of this process, for good. Streams that a caller has replaced already stay."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        original = getattr(sys, f"__{name}__")
        try:
            if original is None or original.fileno() != descriptor:
                continue
            original.flush()
            raw = _Lossy(descriptor, "w", closefd=False)
        except OSError:
            continue
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding=original.encoding, errors="backslashreplace", line_buffering=True
        )
        if getattr(sys, name) is original:
            setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
