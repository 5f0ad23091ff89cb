"""Kills a managed server when `fleet-worker up` and the node of the server have ended without ending it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import psutil

from fleet_worker.host.child_process import kill_group
from fleet_worker.host.servers.process_family import is_alive

LEFTOVERS = "fleet_worker.host.servers.leftovers"
"""The program of a guard; its name is in the command line of each."""


class Guard:
    """A shell that reads a pipe, and acts when nobody holds the other end any more. It costs 1 MB.

    `up` holds that end, and the node of the server does, which gets `descriptor`: if `up` is killed, the node ends its
    requests first. The server itself may not hold it.
    """

    _SCRIPT = """
    group= mark=
    while read -r g m; do group=$g mark=$m; done
    [ -n "$mark" ] || exit 0
    "$1" -P -m "$2" "$mark"
    kill -s KILL -- "-$group"
    """

    def __init__(self) -> None:
        reader, self.descriptor = os.pipe()
        try:
            self._shell = subprocess.Popen(  # noqa: S603 - our own script
                ["/bin/sh", "-c", self._SCRIPT, "sh", sys.executable, LEFTOVERS],
                stdin=reader,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            os.close(self.descriptor)
            raise
        finally:
            os.close(reader)

    @property
    def pid(self) -> int:
        return self._shell.pid

    @property
    def ended(self) -> bool:
        """True if somebody has killed it."""
        return self._shell.poll() is not None

    def watch(self, group: int, mark: str) -> None:
        """Guard this server from now on."""
        self._tell(f"{group} {mark}")

    def release(self) -> None:
        """Guard no server: it has ended."""
        self._tell("")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # `ended` tells it
            os.write(self.descriptor, f"{line}\n".encode())

    def close(self) -> None:
        """End the shell; it guards nothing any more."""
        kill_group(self._shell.pid)
        self._shell.wait()
        os.close(self.descriptor)


def end_guard(guard: psutil.Process) -> None:
    """End the guard of a former `up`, whose server is taken over; no process that is none, if its record is wrong."""
    with contextlib.suppress(psutil.Error):
        if is_alive(guard) and any(LEFTOVERS in word for word in guard.cmdline()):
            kill_group(guard.pid)
