"""Watches one MLX server: asks for its health, sends a canary where only that can tell, reads its list of models."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fleet_worker.errors import FleetError, RequestTimeout
from fleet_worker.mlx.client import MLXClient
from fleet_worker.mlx.offering import Offering
from fleet_worker.node.readiness import Readiness
from fleet_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

CANARY_DEADLINE = 240.0
"""Seconds that a canary may take: the server may have to load the model for it."""
CONFIRM_AFTER = 0.05
"""Seconds until a refused connection is tried again: a server with a full backlog refuses for a moment."""


class HealthMonitor:
    """One thread. `changed` is called in it whenever something may be different from before.

    `working_since` is the monotonic moment since when the server has had work without a break, or None; `models` is
    called with what the server reports as its models.
    """

    def __init__(
        self,
        mlx: MLXClient,
        readiness: Readiness,
        settings: WorkerSettings,
        *,
        canary_for: Callable[[], Offering | None],
        working_since: Callable[[], float | None],
        models: Callable[[list[str]], None],
        changed: Callable[[], None],
    ) -> None:
        self._mlx = mlx
        self._readiness = readiness
        self._settings = settings
        self._canary_for = canary_for
        self._working_since = working_since
        self._models = models
        self._changed = changed
        self._next_canary = 0.0
        self._started = self._canary_worked = False
        self._next_models = time.monotonic() + settings.models_interval
        self._was_refused = False
        self._now = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fleet-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look_now(self) -> None:
        """Something went wrong, or was changed: do not wait for the next look."""
        self._now.set()

    def try_now(self) -> None:
        """It has to prove itself at once, however recent its last canary is."""
        self._next_canary = 0.0
        self._now.set()

    def close(self) -> None:
        """End soon; a canary in progress is not waited for."""
        self._closed = True
        self._now.set()

    def _run(self) -> None:
        while not self._closed:
            try:
                self._look()
                self._changed()
                if self._canary_is_due():
                    self._send_canary()
                    self._changed()
                self._read_models()
            except Exception as error:
                log.error("the watch over the MLX server failed (%s), and goes on", type(error).__name__)
            self._now.wait(self._settings.probe_interval)
            self._now.clear()

    def _look(self) -> None:
        asked = time.monotonic()
        try:
            ready = self._healthy()
        except RequestTimeout:
            self._readiness.late(asked)
        except FleetError:
            self._readiness.refused()
            self._mlx.unreachable.set()
            self._was_refused = True
        else:
            self._mlx.unreachable.clear()
            self._readiness.answered(ready)
            if ready and not self._settings.canary:
                self._readiness.canary_ended(None)
            if self._was_refused:
                self._meet_a_new_server()
        self._readiness.content_at(self._mlx.last_content)
        self._readiness.working_since(self._working_since())

    def _meet_a_new_server(self) -> None:
        """It was away, and may be another one now. It gets a canary of its own, unless the last one had failed."""
        self._was_refused, self._next_models = False, 0.0
        self._readiness.has(self._readiness.state.missing)
        if self._canary_worked:
            self._next_canary, self._canary_worked = 0.0, False

    def _healthy(self) -> bool:
        try:
            return self._mlx.health(timeout=self._settings.probe_timeout).ready
        except RequestTimeout:
            raise
        except FleetError:
            time.sleep(CONFIRM_AFTER)
            return self._mlx.health(timeout=self._settings.probe_timeout).ready

    def _canary_is_due(self) -> bool:
        """Never while it works for somebody: that is the better canary."""
        idle = self._working_since() is None
        return self._settings.canary and idle and self._readiness.needs_canary and self._next_canary <= time.monotonic()

    def _send_canary(self) -> None:
        """One token, to see whether it works. The one at start does not count for how often there may be one."""
        offering = self._canary_for()
        if offering is None:
            return
        started = time.monotonic()
        self._next_canary = started + self._settings.canary_interval if self._started else started
        self._started = True
        try:
            self._mlx.canary(offering, deadline=started + CANARY_DEADLINE)
        except FleetError as error:
            log.warning("a canary failed: %s", error.message)
            self._canary_worked = False
            self._readiness.canary_ended(error)
        else:
            self._canary_worked = True
            self._readiness.canary_ended(None)

    def _read_models(self) -> None:
        """Rarely: it costs a server a walk through its disk cache."""
        if self._readiness.state.status != "available" or time.monotonic() < self._next_models:
            return
        self._next_models = time.monotonic() + self._settings.models_interval
        try:
            reported = self._mlx.models()
        except FleetError as error:
            log.warning("the MLX server's list of models could not be read: %s", error.message)
        else:
            self._models(reported)
