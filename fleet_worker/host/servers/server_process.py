"""The process of a managed server: started here, or taken over from an `up` that was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any

import psutil

from fleet_worker.host.child_process import how_ended, kill_group
from fleet_worker.host.servers.memory import memory_of
from fleet_worker.host.servers.process_family import ProcessFamily, is_alive
from fleet_worker.host.servers.server_command import ServerCommand


class ServerProcess:
    """A server that leads its own session and group, with all that it starts. No method waits."""

    def __init__(
        self, leader: psutil.Process, mark: str, fingerprint: str, child: subprocess.Popen[Any] | None
    ) -> None:
        self.pid = leader.pid
        self.mark = mark
        self.fingerprint = fingerprint
        self.adopted = child is None
        """True if it is no child of this process: no signal tells its end."""
        self._leader = leader
        self._child = child
        self._family = ProcessFamily(leader, mark)

    @classmethod
    def start(cls, command: ServerCommand, mark: str, output: int) -> ServerProcess:
        """Start it; it prints into the file descriptor `output`.

        Raises:
            ConfigurationError: there is no such program.
            OSError: it cannot be started.
        """
        command.make_model_cache()
        child = subprocess.Popen(  # noqa: S603 - the operator's command line
            command.located(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=command.environment(mark),
            start_new_session=True,
        )
        return cls(psutil.Process(child.pid), mark, command.fingerprint, child)

    @classmethod
    def adopt(cls, leader: psutil.Process, mark: str, fingerprint: str) -> ServerProcess:
        return cls(leader, mark, fingerprint, None)

    def how_ended(self) -> str | None:
        """Return how it ended; None if it runs."""
        if self._child:
            code = self._child.poll()
            return None if code is None else how_ended(code)
        return None if is_alive(self._leader) else "ended"

    def terminate(self) -> None:
        """Send SIGTERM to its group, and to children that have left it."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # a stopped process handles no SIGTERM

    def kill(self) -> None:
        """Send SIGKILL to it and all that it has started."""
        self._family.kill()
        if self._child or self.how_ended() is None:  # else the number may be that of another group by now
            kill_group(self.pid)

    def memory(self) -> int | None:
        """Return the bytes that it holds with all that it has started."""
        return memory_of(self._family.living())

    def holds(self, port: int) -> bool | None:
        """Tell whether one of its processes listens on this port; None if that cannot be known."""
        known = False
        for process in self._family.living():
            with contextlib.suppress(psutil.Error, OSError):
                connections = process.net_connections("tcp")
                known = True
                if any(each.laddr and each.laddr.port == port for each in connections):
                    return True
        return False if known else None

    def owns(self, process: psutil.Process) -> bool:
        return process in self._family.living()

    def _signal(self, number: signal.Signals) -> None:
        outside = [process for process in self._family.living() if not self._in_group(process)]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
        for process in outside:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _in_group(self, process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == self.pid
        except OSError:
            return True
