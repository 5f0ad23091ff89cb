"""The owner of this host comes first: whether it may work now, and that it stays awake while it does."""

from __future__ import annotations

import time
from functools import partial

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability.keep_awake import KeepAwake
from fleet_worker.host.availability.watcher import AvailabilityWatcher
from fleet_worker.host.node_process import NEVER
from fleet_worker.host.up.event_loop import EventLoop
from fleet_worker.host.up.server_plan import Away


class Owner:
    """Tells by `away` why this host must not work. Its watcher has a thread of its own, which wakes the loop."""

    def __init__(self, loop: EventLoop) -> None:
        self.away: Away | None = None
        self._loop = loop
        self._settings: AvailabilitySettings | None = None
        self._watcher: AvailabilityWatcher | None = None
        self._keep_awake: KeepAwake | None = None
        self._told_drained = False

    @property
    def due(self) -> float:
        """The time.monotonic() at which `act` has something to do."""
        return self._keep_awake.due if self._keep_awake else NEVER

    def settle(self, settings: AvailabilitySettings) -> None:
        """Ask for what these settings name; without any, this host always works."""
        if settings == self._settings:
            return
        self.close()
        self._settings = settings
        self._keep_awake = KeepAwake(settings)
        if settings.in_use:
            self._watcher = AvailabilityWatcher(settings, changed=partial(self._changed, settings))
            self._take(settings, self._watcher.reason, settings.grace)
            self._watcher.start()
        else:
            self._take(settings, "", 0.0)

    def act(self, *, running: int, all_idle: bool) -> None:
        """Keep this machine awake if its nodes run something; let it sleep if they are all idle until they are told to
        go on.
        """
        if self._keep_awake:
            self._keep_awake.working(running)
            if self._keep_awake.due <= time.monotonic():
                self._keep_awake.act()
        is_drained = all_idle and self.away is not None
        if is_drained and not self._told_drained and self._watcher:
            self._watcher.drained()
        self._told_drained = is_drained

    def close(self) -> None:
        if self._watcher:
            self._watcher.stop()
        if self._keep_awake:
            self._keep_awake.close()
        self._watcher = self._keep_awake = None

    def _changed(self, settings: AvailabilitySettings, reason: str, grace: float) -> None:
        """In the thread of the watcher."""
        self._loop.call(partial(self._take, settings, reason, grace))

    def _take(self, settings: AvailabilitySettings, reason: str, grace: float) -> None:
        if settings is not self._settings:  # it was said by an earlier watcher
            return
        self.away = Away(reason, grace, settings.stop_servers) if reason else None
