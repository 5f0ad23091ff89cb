"""What becomes of an attempt that no node has accepted: it waits in its lane, is better off elsewhere, or is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.absence_watch import AbsenceWatch
from fleet_worker.router.admission import Admission
from fleet_worker.router.reply_consumer import ReplyConsumer
from fleet_worker.router.route import Route
from fleet_worker.router.scheduler import BROKER_PATIENCE
from fleet_worker.settings import RouterSettings

CHECK_EVERY = 1.0
"""Seconds between two checks of an attempt that is not in its lane, as its `Accepted` frame may be on its way; or that
is in the direct lane of a node which the router has chosen, as that node may say that it is not ready."""

Verdict = Literal["waits", "stranded", "lost", "unserved"]
"""The attempt waits in its lane; its node does not take it; it is in no lane any more; no node was there in time."""


class QueueWatch:
    """Of one request, for one attempt after the other. `check` is for the scheduler thread: it may ask the broker."""

    def __init__(
        self, settings: RouterSettings, admission: Admission, replies: ReplyConsumer, absence: AbsenceWatch
    ) -> None:
        self._settings = settings
        self._admission = admission
        self._replies = replies
        self.absence = absence
        self.sent_at = 0.0
        """When the present attempt was sent: time.monotonic() seconds."""
        self._missing_since: float | None = None
        """Since when it is known not to be in its lane, on the clock of the reply consumer."""

    @contextmanager
    def sending(self, request: FleetRequest, route: Route) -> Iterator[None]:
        """Within this block an attempt is sent. A node may accept it before the block ends."""
        self._look(request, route)
        self._missing_since, self.sent_at = None, time.monotonic()
        try:
            yield
        finally:
            self.sent_at = time.monotonic()

    def first_check(self, route: Route) -> float:
        """Return the time of the first check after an attempt was sent."""
        return min(self.sent_at + self._check_every(route), self.absence.next_look())

    def check(self, request: FleetRequest, route: Route, now: float) -> tuple[Verdict, float]:
        """Find out what has become of the present attempt; return that, and the time of the next check."""
        if self._look(request, route):
            return "unserved", now + CHECK_EVERY
        verdict, next_at = self._check_message(request, route, now)
        return verdict, min(next_at, self.absence.next_look())

    def _look(self, request: FleetRequest, route: Route) -> bool:
        is_served = self._admission.is_served(route.lane(request))
        return self.absence.look(request, route.only, is_served=is_served)

    def _check_message(self, request: FleetRequest, route: Route, now: float) -> tuple[Verdict, float]:
        due = self.sent_at + self._settings.accept_timeout
        if route.is_stranded(request, now - self.sent_at, self._settings):
            return "stranded", now + CHECK_EVERY
        if now < due:
            return "waits", min(due, now + self._check_every(route))
        queued = self._admission.is_queued(route.lane(request), request.priority, self.sent_at, BROKER_PATIENCE)
        if queued is not False:  # None: the broker does not tell
            self._missing_since = None
            return "waits", now + (self._check_every(route) if queued else CHECK_EVERY)
        if self._missing_since is None:
            self._missing_since = self._replies.clock
        is_lost = self._replies.silence(self._missing_since) >= CHECK_EVERY
        return "lost" if is_lost else "waits", now + CHECK_EVERY

    def _check_every(self, route: Route) -> float:
        """Seconds. A node may accept the request right after a check, and be lost `lost_after` seconds later."""
        return CHECK_EVERY if route.is_chosen else min(self._settings.accept_timeout, self._settings.lost_after)
