"""Monitors one MLX server: asks `/health`, sends a canary where only that can tell, reads the list of models."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fleet_worker.errors import FleetError, InstanceUnavailable, ModelNotServed, Overloaded, RequestTimeout
from fleet_worker.mlx.activity import LOADS_WITHIN
from fleet_worker.mlx.client import MLXClient
from fleet_worker.mlx.offering import Offering
from fleet_worker.node.offered_models import OfferedModels
from fleet_worker.node.readiness import Readiness
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.node.server_fault import ServerFault
from fleet_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

CANARY_DEADLINE = LOADS_WITHIN
"""Seconds that a canary may take: the server may have to load the model for it."""
DOUBT_DEADLINE = 3.0
"""Seconds within which a canary has to work that is sent because of a doubt."""
SILENCE_DEADLINE = 5.0
"""The same if the server may have to be restarted: that ends all that it does."""
SILENT_FOR = 1.5
"""Seconds without an answer and without content after which a server with work may be frozen."""
LAST_CHANCE = 2.5
"""Seconds in which a server that is only slow still answers `/health`."""
CHECKS_APART = 0.05
"""Seconds between the beginnings of two checks at least, however many requests fail."""
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
        restarted: Callable[[], None] = lambda: None,
        prefill_speed: Callable[[], float | None] = lambda: None,
        fault_changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`restarted` is called when a server has come back that was away: what it had in memory is gone.
        `prefill_speed` is what was measured, in tokens per second. `fault_changed` is called when `fault.text` has."""
        self._mlx = mlx
        self._readiness = readiness
        self._models = models
        self._running = running
        self._settings = settings
        self._changed = changed
        self._restarted = restarted
        self.fault = ServerFault(
            mlx,
            readiness,
            running,
            stall_after=settings.stall_after,
            prefill_speed=prefill_speed,
            changed=fault_changed,
        )
        self._next_canary = 0.0
        self._had_canary = False
        self._doubted_models: set[str] = set()
        self._in_doubt_since: float | None = None
        self._next_models = time.monotonic() + settings.models_interval
        self._refused_at: float | None = None
        """When the server last took no connection; None since it did."""
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fleet-health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def check_now(self) -> None:
        """Do not wait for the next check: a request failed, or the node was changed."""
        self._wake.set()

    def request_failed(self, error: FleetError, request_id: str) -> None:
        """An attempt at this request ended with this error of the server."""
        self._readiness.failed(error, request_id)
        self.fault.request_failed(error)
        self._wake.set()

    def server_is_replaced(self) -> None:
        """What answers next is a new process of the server, even if nobody has seen the old one end."""
        self.fault.forget()
        self._refused_at = time.monotonic()

    def check_model(self, model: str) -> None:
        """Find out whether the server still has this model: it told a request that it has not."""
        self._doubted_models.add(model)
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
            earliest = time.monotonic() + min(self._settings.probe_interval, CHECKS_APART)
            try:
                self._check()
            except Exception as error:
                log.error("a check of the MLX server failed (%s), the next one follows", type(error).__name__)
            self._wake.wait(self._settings.probe_interval)
            time.sleep(max(0.0, earliest - time.monotonic()))
            self._wake.clear()

    def _check(self) -> None:
        self._check_health()
        self._changed()
        if self._is_frozen():
            self._release_work()
        is_in_doubt = self._readiness.in_doubt(idle=self._running.busy_since is None)
        if is_in_doubt or (self._settings.canary and self.fault.canary_is_due()):
            self._settle_doubt()
            self._changed()
        elif self._canary_is_due():
            self._send_canary()
            self._changed()
        while self._doubted_models:
            self._settle_model(self._doubted_models.pop())
            self._changed()
        if self._readiness.state.ready and time.monotonic() >= self._next_models:
            self._read_models()
            self._changed()

    def _check_health(self) -> None:
        asked = time.monotonic()
        try:
            ready = self._ask_health()
        except RequestTimeout:
            self._readiness.health_late(asked)
        except FleetError:
            self._readiness.connection_refused()
            self._mlx.unreachable.set()
            self._refused_at = time.monotonic()
        else:
            self._mlx.unreachable.clear()
            self._readiness.health_answered(ready)
            self.fault.health_answered(ready)
            if ready and not self._settings.canary:
                self._readiness.canary_ended(None)
            if self._refused_at is not None:
                self._expect_a_new_server(self._refused_at)
        self._readiness.content_received(self._mlx.last_content)
        self.fault.content_received(self._mlx.last_content)
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

    def _expect_a_new_server(self, refused_at: float) -> None:
        """Read the models again: it may be another server now. It is the same if it has sent content meanwhile: it was
        only too busy for new connections."""
        self._refused_at, self._next_models = None, 0.0
        self._models.forget_missing()
        self.fault.forget()
        if self._mlx.last_content < refused_at:
            self._mlx.activity.forget()
            self._restarted()

    def _settle_doubt(self) -> None:
        """Let a canary decide, while requests go on. If the server is too busy for it, the next check sends another."""
        now = time.monotonic()
        since = self._in_doubt_since = self._in_doubt_since or now
        offering = self._models.for_canary(self._mlx.activity.loaded) if self._settings.canary else None
        patience = SILENCE_DEADLINE if self.fault.silence() else DOUBT_DEADLINE
        failure = self._canary(offering, now + patience) if offering else None
        too_busy = isinstance(failure, Overloaded) and self._running.busy_since is not None
        if too_busy and time.monotonic() - since < DOUBT_DEADLINE:
            return
        self._in_doubt_since = None
        self._readiness.content_received(self._mlx.last_content)  # of a request that the canary had to wait for
        if offering is None or too_busy or isinstance(failure, RequestTimeout):
            self._readiness.confirm_doubt()
        else:
            self._readiness.canary_ended(failure)

    def _settle_model(self, model: str) -> None:
        """Offer this model no more if the server tells a canary too that it does not have it."""
        offering = self._models.available.get(model) if self._settings.canary else None
        failure = self._canary(offering, time.monotonic() + DOUBT_DEADLINE) if offering else None
        if offering is None or isinstance(failure, ModelNotServed):
            self._models.lacks(model)

    def _canary_is_due(self) -> bool:
        """Never while requests run: their tokens prove more."""
        idle = self._running.busy_since is None
        return self._settings.canary and idle and self._readiness.needs_canary and self._next_canary <= time.monotonic()

    def _send_canary(self) -> None:
        """Ask for one token. Only a canary that failed delays the next one, and not if it was the first of all."""
        offering = self._models.for_canary(self._mlx.activity.loaded)
        if offering is None:
            return
        started = time.monotonic()
        failure = self._canary(offering, started + CANARY_DEADLINE)
        self._next_canary = started + self._settings.canary_interval if failure and self._had_canary else started
        self._had_canary = True
        self._readiness.canary_ended(failure)

    def _canary(self, offering: Offering, deadline: float) -> FleetError | None:
        """Ask for one token; return why there was none."""
        silence, was_patient = self.fault.silence(), deadline - time.monotonic() > SILENCE_DEADLINE
        failure: FleetError | None = None
        try:
            self._mlx.canary(offering, deadline=deadline)
        except FleetError as error:
            log.warning("a canary failed: %s", error.message)
            failure = error
        self.fault.canary_ended(failure, silence, was_patient=was_patient)
        return failure

    def _is_frozen(self) -> bool:
        """Return whether neither the server nor any of its streams shows life, though a healthy one would.

        A server that is only slow answers a last question with more time. Where `/health` is blocked while a prompt is
        read, silence means nothing as long as one may be read.
        """
        has_work = self._running.busy_since is not None and not self._mlx.activity.may_be_blocked
        if not has_work or self._readiness.silence < SILENT_FOR:
            return False
        asked = time.monotonic()
        try:
            self._mlx.health(timeout=LAST_CHANCE)
        except FleetError:
            return self._mlx.last_content < asked
        return False

    def _release_work(self) -> None:
        """End all requests, so that other nodes go on with them."""
        text = "the MLX server is frozen: it answers nothing, and none of its streams moves"
        released = self._running.stop(lambda: InstanceUnavailable(text, instance_frozen=True))
        log.warning("%s; other nodes go on with what it had: %d", text, released)

    def _read_models(self) -> None:
        """Rarely: for each list, a server walks through its disk cache."""
        self._next_models = time.monotonic() + self._settings.models_interval
        try:
            self._models.follow_server(self._mlx.models())
        except FleetError as error:
            log.warning("the MLX server's list of models could not be read: %s", error.message)
