"""Keeps this machine from sleeping while a node runs a request."""

from __future__ import annotations

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.node_process import NEVER


class KeepAwake:
    """At most one process of `caffeinate` or `systemd-inhibit`. No method waits: call `act` at the time `due`."""

    def __init__(self, settings: AvailabilitySettings) -> None:
        self._settings = settings

    @property
    def due(self) -> float:
        """The time.monotonic() at which `act` has something to do."""
        return NEVER

    def working(self, running: int) -> None:
        """Tell it how many requests run on this host."""

    def act(self) -> None:
        """End the process, if nothing has run for a while."""

    def close(self) -> None:
        """End the process at once."""
