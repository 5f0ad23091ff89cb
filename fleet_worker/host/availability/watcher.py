"""Tells `fleet-worker up` when this host may work, and why not."""

from __future__ import annotations

from collections.abc import Callable

from fleet_worker.availability_settings import AvailabilitySettings

Changed = Callable[[str, float], None]
"""Called with the reason why this host must not work, "" if it may, and the seconds that running requests have.
It is called in the thread of the watcher, and must not wait."""


class AvailabilityWatcher:
    """Watches the owner of this host from a thread of its own, if `settings` ask for anything."""

    def __init__(self, settings: AvailabilitySettings, *, changed: Changed) -> None:
        self.reason = ""
        """Why this host must not work; "" if it may. Until the first look that is not known, and it must not."""
        self._settings = settings
        self._changed = changed

    def start(self) -> None:
        """Look for the first time, in its thread; `changed` is called for what is found, also if that is ""."""

    def stop(self) -> None:
        """End the thread and all of its processes. `changed` is not called any more when this returns."""

    def drained(self) -> None:
        """Tell it that no node runs anything: this machine may go to sleep, if it waits for that."""
