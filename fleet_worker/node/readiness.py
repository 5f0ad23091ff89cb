"""Decides from what was observed whether an instance works. `/health` alone is not enough: a server may answer 200
with a dead engine.

    starting ────── proof ──────> available <── health answers ── degraded (health answers late)
                                   │     ▲                            │
       refused, not ready, or      │     │ proof                      │ no answer and no content
       a doubt that is confirmed   ▼     │                            ▼ for GIVE_UP_AFTER
                                  unavailable <───────────────────────

Proof is a token of a request, or a canary that worked. A `degraded` instance is slow but alive, and takes no new work.

A doubt: FAILURES attempts failed in a row, or work is in progress and no token comes. It may be the fault of these
requests, so an instance in doubt goes on with its work, and a canary decides: it is a proof, or it confirms the doubt.
It is sent at once if the attempts were of as many different requests, otherwise when no other request runs that could
be the proof. An instance that was silent in the middle of work is then degraded, and needs a proof.

Orders override all of it. In this order: the node is ending; an operator has drained it; its host has paused it, since
the owner of the machine needs it, or since its MLX server is being restarted. Each ends by its own counterpart only,
and then the instance needs a proof.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from fleet_worker.errors import (
    ConfigurationError,
    FleetError,
    InstanceUnavailable,
    InvalidOutput,
    ProviderError,
    RequestTimeout,
    Unauthorized,
)
from fleet_worker.protocol.status import Status

GIVE_UP_AFTER = 10.0
"""Seconds without an answer and without content after which a late server counts as unavailable."""
FAILURES = 3
"""Failures in a row by the server's fault, after which the instance is in doubt."""


@dataclass(frozen=True, slots=True)
class State:
    """Whether an instance works, and why not."""

    status: Status
    reason: str = ""

    @property
    def ready(self) -> bool:
        return self.status == "available"


class Readiness:
    """The state of one instance. Times are `time.monotonic()` seconds. Safe for all threads."""

    def __init__(self, *, stall_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_after = stall_after
        self._clock = clock
        self._lock = threading.Lock()
        self._unproven: tuple[Status, str] | None = ("starting", "not tried yet")
        """The status and reason until the next proof; None after a proof."""
        self._doubt: tuple[Status, str] | None = None
        """What they become if the canary confirms the doubt."""
        self._late_since: float | None = None
        self._silent_since: float | None = None
        """Since when neither `/health` has answered nor content has come."""
        self.began_late = False
        """Whether the server took connections, and gave no answer, when that began: its process has not ended."""
        self._health_ready = False
        self._last_content = 0.0
        self._last_fault = 0.0
        self._failures = 0
        """In a row."""
        self._failed: set[str] = set()
        """The requests of these failures, at most FAILURES of them."""
        self._drained = self._ending = False
        self._paused: State | None = None

    # Observed by the tasks

    def failed(self, error: FleetError, request_id: str) -> None:
        """An attempt at this request ended with this error."""
        with self._lock:
            if isinstance(error, InstanceUnavailable) and not _answered(error):
                self._require_proof("unavailable", error.message)
            elif isinstance(error, InstanceUnavailable):
                self._suspect("unavailable", error.message)
            elif _is_fault_of_server(error):
                self._last_fault = self._clock()
                self._failures += 1
                if len(self._failed) < FAILURES:
                    self._failed.add(request_id)
                if self._failures >= FAILURES:
                    reason = f"{self._failures} requests failed in a row, the last: {error.message}"
                    self._suspect("unavailable", reason)

    # Observed by the health monitor

    def content_received(self, at: float) -> None:
        """The server sent content at this time: a proof, if no fault came after it."""
        with self._lock:
            if at > self._last_content:
                self._last_content, self._late_since, self._silent_since = at, None, None
                if at > self._last_fault:
                    self._proved()

    def health_answered(self, ready: bool) -> None:
        with self._lock:
            self._late_since, self._silent_since, self._health_ready = None, None, ready
            if not ready:
                self._require_proof("unavailable", "the MLX server says that it is not ready")

    def health_late(self, asked: float) -> None:
        """`/health`, asked at this time, did not answer. Ignored if content has arrived since."""
        with self._lock:
            if self._last_content >= asked:
                return
            self._late_since = self._late_since or asked
            if self._silent_since is None:
                self._silent_since, self.began_late = asked, True
            if self._clock() - self._late_since >= GIVE_UP_AFTER:
                self._require_proof("unavailable", "the MLX server does not answer")

    def connection_refused(self) -> None:
        """Nothing listens at the server's address, or it closes the connection. (A frozen server refuses too, once its
        backlog is full.)"""
        with self._lock:
            if self._silent_since is None:
                self._silent_since, self.began_late = self._clock(), False
            self._late_since, self._health_ready = None, False
            self._require_proof("unavailable", "the MLX server does not accept connections")

    def busy_since(self, since: float | None) -> None:
        """Requests have been running since this time; None if none runs."""
        with self._lock:
            if since is not None and self._clock() - max(since, self._last_content) > self._stall_after:
                self._suspect("degraded", f"no token for more than {self._stall_after:g} s while work is in progress")

    def canary_ended(self, error: FleetError | None) -> None:
        """A canary worked (None), or failed with this error. Its own token is no proof then."""
        with self._lock:
            if error:
                self._unproven, self._doubt = ("unavailable", f"a canary failed: {error.message}"), None
                self._last_fault = self._clock()
            else:
                self._late_since = self._silent_since = None
                self._proved()

    def confirm_doubt(self) -> None:
        """A canary had no answer in time, or none can be sent."""
        with self._lock:
            if self._doubt:
                self._require_proof(*self._doubt)

    # Ordered by the end of the node, by an operator, or by the host

    def drain(self, *, ending: bool = False) -> None:
        """Take no more work, whatever the server can do; for good if the node is ending."""
        with self._lock:
            self._drained = True
            self._ending = self._ending or ending

    def undrain(self) -> None:
        """Take work again after a proof: the server may have been changed meanwhile."""
        with self._lock:
            if self._drained and not self._ending:
                self._drained = False
                self._require_proof("starting", "not tried since it was drained")

    def pause(self, status: Status, reason: str) -> None:
        """Take no work until `resume`, and show this: the server may be stopped meanwhile, which is no fault."""
        with self._lock:
            self._paused = State(status, reason)

    def resume(self) -> None:
        """Take work again after a proof. All that was observed may be true of an earlier process of the server only."""
        with self._lock:
            if self._paused:
                self._unproven = "starting", f"not tried since it was paused: {self._paused.reason}"
                self._paused = self._doubt = self._late_since = self._silent_since = None
                self._health_ready, self._last_fault = False, self._clock()
                self._failures = 0
                self._failed.clear()

    # The result

    @property
    def paused(self) -> State | None:
        """What a pause shows; None without one. A drain may hide it."""
        return self._paused

    @property
    def is_ordered(self) -> bool:
        """Return whether an order keeps it from work, whatever the server can do."""
        return self._drained or self._paused is not None

    @property
    def needs_canary(self) -> bool:
        """True if the server says that it is ready, and only a canary or a request can prove it."""
        is_unproven = self._unproven is not None and self._paused is None
        return is_unproven and self._late_since is None and self._health_ready

    def in_doubt(self, *, idle: bool) -> bool:
        """Return whether a canary has to decide now; unless the instance is idle, a request may be the proof."""
        if self._doubt is None or self._unproven is not None or self._late_since is not None or self._paused:
            return False
        return idle or not 0 < len(self._failed) < FAILURES

    @property
    def silence(self) -> float:
        """Seconds since which neither `/health` has answered nor content has come; 0 if one of them did."""
        since = self._silent_since
        return 0.0 if since is None else self._clock() - since

    @property
    def state(self) -> State:
        with self._lock:
            if self._ending:
                return State("drained", "the node is ending")
            if self._drained:
                return State("drained", "it takes no work until fleet-worker undrain")
            if self._paused:
                return self._paused
            if self._unproven:
                return State(*self._unproven)
            if self._late_since is not None:
                return State("degraded", "the MLX server answers late")
            return State("available")

    def _proved(self) -> None:
        self._unproven = self._doubt = None
        self._failures = 0
        self._failed.clear()

    def _suspect(self, status: Status, reason: str) -> None:
        self._last_fault = self._clock()
        self._doubt = self._doubt or (status, reason)

    def _require_proof(self, status: Status, reason: str) -> None:
        """Keep the first reason until it is disproved. Only `unavailable` may replace `degraded` or `starting`."""
        self._doubt, self._last_fault = None, self._clock()
        if self._unproven is None or (self._unproven[0] != "unavailable" and status == "unavailable"):
            self._unproven = (status, reason)


def _answered(error: FleetError) -> bool:
    """Return True if the server itself answered that it is not ready. It may say so to one request only."""
    return "status" in error.metadata


def _is_fault_of_server(error: FleetError) -> bool:
    """Return True for errors that a healthy server may cause once, and only a failing one in a row."""
    if isinstance(error, RequestTimeout):
        return error.retryable  # a timeout of the server, not the caller's deadline
    if isinstance(error, InvalidOutput):  # the model is to blame, or what it was asked
        return False
    return isinstance(error, ProviderError | Unauthorized | ConfigurationError)
