"""The port of a managed server: free, held by one of our own processes, or by a stranger's."""

from __future__ import annotations

from fleet_worker.host.servers import port_owner
from fleet_worker.host.servers.custody import Custody
from fleet_worker.host.servers.process_family import kill_all
from fleet_worker.host.servers.server_command import ServerCommand
from fleet_worker.host.servers.server_process import ServerProcess

PATIENT_LOOKS = 3
"""Looks at a port that is taken before that is told: a process that is ending frees it within a second."""
FIRST_PAUSE = 0.2
PAUSE = 3.0
"""Seconds between two looks at a port that a stranger holds."""


class ServerPort:
    """Looks at the port that a server is to have."""

    def __init__(self, custody: Custody) -> None:
        self._custody = custody
        self._looks = 0
        """In a row at which it was taken."""

    def taken_by(self, command: ServerCommand) -> str:
        """Return who has the port before the server starts; empty if it is free. An own process is killed."""
        if not port_owner.is_taken(command.host, command.port):
            self._looks = 0
            return ""
        self._looks += 1
        owner = port_owner.owner(command.port)
        text = f"port {command.port} is in use by {port_owner.described(owner)}"
        if owner and self._custody.owns(owner):
            kill_all([owner])
            text += ", which an earlier server has left behind"
        return text

    @property
    def blocks(self) -> bool:
        """True if it does not become free by itself."""
        return self._looks > PATIENT_LOOKS

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        return PAUSE if self.blocks else FIRST_PAUSE * 2.0 ** (self._looks - 1)

    def stranger(self, command: ServerCommand, process: ServerProcess) -> str:
        """Return who accepts connections there instead of the server; empty if the server does, or none is known."""
        if process.holds(command.port) is not False:
            return ""
        owner = port_owner.owner(command.port)
        strange = owner is not None and not self._custody.owns(owner)
        return f"port {command.port} is in use by {port_owner.described(owner)}" if strange else ""
