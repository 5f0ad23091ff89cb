"""A server and all processes that it has started, also those that left its group or survived their parent."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator

import psutil

from fleet_worker.host.servers.server_command import MARK


class ProcessFamily:
    """Remembers every child that it has seen: a child whose parent has ended is nobody's child any more."""

    def __init__(self, leader: psutil.Process, mark: str) -> None:
        self._leader = leader
        self._mark = mark
        self._seen = {leader}

    def living(self) -> list[psutil.Process]:
        """Look for further children; return all members that have not ended. Takes milliseconds."""
        with contextlib.suppress(psutil.Error):
            self._seen.update(self._leader.children(recursive=True))
        self._seen = {process for process in self._seen if is_alive(process)}
        return list(self._seen)

    def kill(self) -> None:
        """Send SIGKILL to all of them, also to those that only their variables tell."""
        kill_all([*self.living(), *marked(self._mark)])


def marked(mark: str) -> Iterator[psutil.Process]:
    """Yield the processes of this user whose variable `FLEET_SERVER` is `mark`, or begins with it and a slash.

    Programs of Apple hide their variables.
    """
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid() and is_marked(process, mark):
                yield process
        except (psutil.Error, OSError):
            continue


def is_marked(process: psutil.Process, mark: str) -> bool:
    found = str(process.environ().get(MARK, ""))
    return found == mark or found.startswith(f"{mark}/")


def may_lead(process: psutil.Process, mark: str) -> bool:
    """Tell whether a process may be the server with this mark, by all that can be known: a wrong record must not make
    us kill another program. A program may hide its variables, or write its title over them.
    """
    try:
        ours = process.uids().real == os.getuid() and os.getpgid(process.pid) == process.pid
        if not ours or process in [psutil.Process(), *psutil.Process().parents()]:
            return False
        with contextlib.suppress(psutil.AccessDenied, OSError):
            return process.environ().get(MARK, mark) == mark
        return True
    except (psutil.Error, OSError):
        return False


def is_alive(process: psutil.Process) -> bool:
    """Return False if it has ended, also if its id is that of another process by now."""
    try:
        return bool(process.is_running()) and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


def kill_all(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            process.send_signal(signal.SIGKILL)  # not if its id is that of another process by now
