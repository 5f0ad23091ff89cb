"""Can this instance really work? What was seen decides; what `/health` says is only a part of it.

    starting ────── proof ──────> available <── it answers again ── degraded (late: not an answer for a moment)
                                   │     ▲                              │
       refused, not ready, dead,   │     │ proof                        │ no sign of life for GIVE_UP_AFTER
       or failing without a break  ▼     │                              ▼
                                  unavailable <──────────────────────────

Proof is a real token, or a canary that worked: servers answer 200 with a dead engine. `degraded` is slow but alive and
takes no new work; an instance that fell silent in the middle of work is degraded too, and has to prove itself.
`drained` is above all of it: somebody wants it to take no work, whatever it can do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fleet_worker.errors import (
    ConfigurationError,
    FleetError,
    InstanceUnavailable,
    ProviderError,
    RequestTimeout,
    Unauthorized,
)
from fleet_worker.protocol.status import Status

GIVE_UP_AFTER = 10.0
"""Seconds without any sign of life after which a late server counts as dead."""
FAILURES = 3
"""Requests in a row that the server failed, none working in between, after which it has to prove itself."""


@dataclass(frozen=True, slots=True)
class State:
    """What an instance is, and why; `missing` are models that its server turned out not to have."""

    status: Status
    reason: str = ""
    missing: frozenset[str] = frozenset()

    @property
    def ready(self) -> bool:
        return self.status == "available"


class Readiness:
    """Judges one instance. Moments are monotonic seconds; any thread may tell what it saw."""

    def __init__(self, *, stall_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_after = stall_after
        self._clock = clock
        self._lock = threading.Lock()
        self._unproven: tuple[Status, str] | None = ("starting", "not tried yet")
        self._late_since: float | None = None
        self._says_ready = False
        self._sign = 0.0
        self._blamed_at = 0.0
        self._failures = 0
        self._drained = self._ending = False
        self._missing: frozenset[str] = frozenset()

    # What the tasks saw

    def failed(self, error: FleetError) -> None:
        """A request ended with this error."""
        with self._lock:
            if isinstance(error, InstanceUnavailable):
                self._doubt("unavailable", error.message)
            elif _blames_the_server(error):
                self._failures += 1
                self._blamed_at = self._clock()
                if self._failures >= FAILURES:
                    self._doubt("unavailable", f"{self._failures} requests failed in a row, the last: {error.message}")

    def lacks(self, model: str) -> None:
        """The server says that it does not have this model."""
        with self._lock:
            self._missing |= {model}

    # What the watch saw

    def content_at(self, moment: float) -> None:
        """The server delivered something at that moment: the one real proof."""
        with self._lock:
            if moment > self._sign:
                self._sign, self._late_since = moment, None
                if moment > self._blamed_at:  # what came before a fault disproves nothing
                    self._failures, self._unproven = 0, None

    def answered(self, ready: bool) -> None:
        """`/health` answered."""
        with self._lock:
            self._late_since, self._says_ready = None, ready
            if not ready:
                self._doubt("unavailable", "the MLX server says that it is not ready")

    def late(self, asked: float) -> None:
        """`/health` did not answer. No sign of trouble while content arrives."""
        with self._lock:
            if self._sign >= asked:
                return
            self._late_since = self._late_since or asked
            if self._clock() - self._late_since >= GIVE_UP_AFTER:
                self._doubt("unavailable", "the MLX server does not answer")

    def refused(self) -> None:
        """Nothing listens there, or it hangs up."""
        with self._lock:
            self._late_since, self._says_ready = None, False
            self._doubt("unavailable", "the MLX server does not accept connections")

    def working_since(self, moment: float | None) -> None:
        """Work has been in progress since that moment (None: there is none), of which the last sign is known."""
        with self._lock:
            if moment is not None and self._clock() - max(moment, self._sign) > self._stall_after:
                self._doubt("degraded", f"no token for more than {self._stall_after:g} s while work is in progress")

    def canary_ended(self, error: FleetError | None) -> None:
        """A canary ended: it worked, or failed with this error."""
        with self._lock:
            if error:
                self._unproven = ("unavailable", f"a canary failed: {error.message}")
                self._blamed_at = self._clock()  # its own token is no proof
            else:
                self._failures = 0
                self._unproven = self._late_since = None

    def has(self, models: Iterable[str]) -> None:
        """The server has these models, even if it lacked them before."""
        with self._lock:
            self._missing -= frozenset(models)

    def drain(self, *, ending: bool = False) -> None:
        """Nothing more is to be taken, whatever the server can do; for good if the node is ending."""
        with self._lock:
            self._drained = True
            self._ending = self._ending or ending

    def undrain(self) -> None:
        """It may take work again, once it has proved itself: who knows what was done to the server meanwhile."""
        with self._lock:
            if self._drained and not self._ending:
                self._drained = False
                self._doubt("starting", "not tried since it was drained")

    # What follows

    @property
    def needs_canary(self) -> bool:
        """True if only a canary, or real work, can show whether it works: it says that it is ready."""
        return self._unproven is not None and self._late_since is None and self._says_ready

    @property
    def state(self) -> State:
        with self._lock:
            if self._ending:
                return State("drained", "the node is ending", self._missing)
            if self._drained:
                return State("drained", "it takes no work until fleet-worker undrain", self._missing)
            if self._unproven:
                return State(*self._unproven, missing=self._missing)
            if self._late_since is not None:
                return State("degraded", "the MLX server answers late", self._missing)
            return State("available", missing=self._missing)

    def _doubt(self, status: Status, reason: str) -> None:
        """The first reason stays until it is disproved, except that dead says more than slow, or than not tried yet."""
        self._blamed_at = self._clock()
        if self._unproven is None or (self._unproven[0] != "unavailable" and status == "unavailable"):
            self._unproven = (status, reason)


def _blames_the_server(error: FleetError) -> bool:
    """Errors that a healthy server may show once, and only a sick or a wrongly configured one always."""
    if isinstance(error, RequestTimeout):
        return error.retryable  # its own clocks, not the caller's deadline
    return isinstance(error, ProviderError | Unauthorized | ConfigurationError)
