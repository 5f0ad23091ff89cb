"""One process of a managed server, from its start to its end, and what is known of it meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_worker.host.servers.server_process import ServerProcess


@dataclass(slots=True)
class ServerRun:
    """The present process of a server. The next one has a run of its own, so that nothing of this one is left."""

    process: ServerProcess
    started_at: float
    """time.monotonic() seconds."""
    has_served: bool = False
    """It has accepted connections."""
    memory: int | None = None
    """Bytes, as seen last."""
    ending: str = ""
    """Why it is being ended; empty if it is not."""
    is_asked: bool = False
    """Somebody has asked for its end, so that is no death."""
    killed: bool = False
    """SIGKILL has been sent."""

    def ask_to_end(self, reason: str) -> bool:
        """Note that its end is asked for; return False if it was already. The first reason stays."""
        if self.is_asked:
            return False
        self.ending, self.is_asked = reason, True
        return True
