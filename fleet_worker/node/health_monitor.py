"""Monitors one MLX server: asks `/health`, sends a canary where only that can tell, reads the list of models."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fleet_worker.errors import FleetError, RequestTimeout
from fleet_worker.mlx.client import MLXClient
from fleet_worker.node.offered_models import OfferedModels
from fleet_worker.node.readiness import Readiness
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

CANARY_DEADLINE = 240.0
"""Seconds that a canary may take: the server may have to load the model for it."""
CONFIRM_AFTER = 0.05
"""Seconds until a refused connection is tried again: a server with a full backlog refuses for a short time."""


class HealthMonitor:
    """One thread, which tells `readiness` and `models` what it sees, and then calls `changed`."""

    def __init__(
        self,
        mlx: MLXClient,
        readiness: Readiness,
        models: OfferedModels,
        running: RunningAttempts,
        settings: WorkerSettings,
        changed: Callable[[], None],
    ) -> None:
        self._mlx = mlx
        self._readiness = readiness
        self._models = models
        self._running = running
        self._settings = settings
        self._changed = changed
        self._next_canary = 0.0
        self._had_canary = self._canary_worked = False
        self._next_models = time.monotonic() + settings.models_interval
        self._was_away = False
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fleet-health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def check_now(self) -> None:
        """Do not wait for the next check: a request failed, or the node was changed."""
        self._wake.set()

    def canary_now(self) -> None:
        """Send a canary with the next check, however recent the last one is."""
        self._next_canary = 0.0
        self._wake.set()

    def close(self) -> None:
        """End soon, without waiting for a canary in progress."""
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            try:
                self._check_health()
                self._changed()
                if self._canary_is_due():
                    self._send_canary()
                    self._changed()
                if self._readiness.state.ready and time.monotonic() >= self._next_models:
                    self._read_models()
                    self._changed()
            except Exception as error:
                log.error("a check of the MLX server failed (%s), the next one follows", type(error).__name__)
            self._wake.wait(self._settings.probe_interval)
            self._wake.clear()

    def _check_health(self) -> None:
        asked = time.monotonic()
        try:
            ready = self._ask_health()
        except RequestTimeout:
            self._readiness.health_late(asked)
        except FleetError:
            self._readiness.connection_refused()
            self._mlx.unreachable.set()
            self._was_away = True
        else:
            self._mlx.unreachable.clear()
            self._readiness.health_answered(ready)
            if ready and not self._settings.canary:
                self._readiness.canary_ended(None)
            if self._was_away:
                self._expect_a_new_server()
        self._readiness.content_received(self._mlx.last_content)
        self._readiness.busy_since(self._running.busy_since)

    def _ask_health(self) -> bool:
        """A refused connection is tried twice, a late answer is not asked for again."""
        try:
            return self._mlx.health(timeout=self._settings.probe_timeout).ready
        except RequestTimeout:
            raise
        except FleetError:
            time.sleep(CONFIRM_AFTER)
            return self._mlx.health(timeout=self._settings.probe_timeout).ready

    def _expect_a_new_server(self) -> None:
        """Read the models again, and send a canary at once unless the last one failed: it may be another server now."""
        self._was_away, self._next_models = False, 0.0
        self._models.forget_missing()
        if self._canary_worked:
            self._next_canary, self._canary_worked = 0.0, False

    def _canary_is_due(self) -> bool:
        """Never while requests run: their tokens prove more."""
        idle = self._running.busy_since is None
        return self._settings.canary and idle and self._readiness.needs_canary and self._next_canary <= time.monotonic()

    def _send_canary(self) -> None:
        """Ask for one token. The first canary after the start does not delay the next one."""
        offering = self._models.for_canary()
        if offering is None:
            return
        started = time.monotonic()
        self._next_canary = started + self._settings.canary_interval if self._had_canary else started
        self._had_canary = True
        failure = None
        try:
            self._mlx.canary(offering, deadline=started + CANARY_DEADLINE)
        except FleetError as error:
            log.warning("a canary failed: %s", error.message)
            failure = error
        self._canary_worked = failure is None
        self._readiness.canary_ended(failure)

    def _read_models(self) -> None:
        """Rarely: for each list, a server walks through its disk cache."""
        self._next_models = time.monotonic() + self._settings.models_interval
        try:
            self._models.follow_server(self._mlx.models())
        except FleetError as error:
            log.warning("the MLX server's list of models could not be read: %s", error.message)
