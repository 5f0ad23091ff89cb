"""A process of the system that ends when its input does: by `release`, and with this process, however that ends."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from fleet_worker.host.child_process import kill_group

UNTIL_INPUT_ENDS = ["cat"]
"""A command that does nothing else, for programs that run until another command ends."""
ENDS_WITHIN = 2.0
"""Seconds; then its group is killed."""


class HeldProcess:
    """Its output is thrown away, unless `stdout` is a pipe. Raises `OSError` if it cannot be started."""

    def __init__(self, command: Sequence[str], *, stdout: int = subprocess.DEVNULL) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - commands of the system, with our own arguments
            command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.DEVNULL, start_new_session=True
        )

    @property
    def stdout(self) -> IO[bytes] | None:
        return self._process.stdout

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        return self._process.poll()

    def write_line(self) -> None:
        """Write an empty line to its input."""
        if self._process.stdin:
            with suppress(OSError):
                self._process.stdin.write(b"\n")
                self._process.stdin.flush()

    def release(self) -> None:
        """End its input, and do not wait."""
        if self._process.stdin:
            with suppress(OSError):
                self._process.stdin.close()

    def end(self) -> None:
        """End its input, wait for its end, and kill what is left of its group."""
        self.release()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDS_WITHIN)
        kill_group(self._process.pid)
        self._process.wait()
