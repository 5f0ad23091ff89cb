"""Cancels, and requests to send frames again, from a router to the nodes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kombu import Exchange

from fleet_worker.broker.topology import cancel_exchange
from fleet_worker.protocol.control import ControlMessage
from fleet_worker.router.attempts import CancelOrphan
from fleet_worker.router.scheduler import Scheduler

log = logging.getLogger(__name__)

MAX_IN_ONE_MESSAGE = 1_000
"""Requests that one message cancels."""


class CancelPublisher:
    """Collects what the nodes are to know; the scheduler thread publishes it at once, all together.

    Best effort: if a node goes on with a cancelled request, the session cancels it again on each of its heartbeats, and
    an attempt whose missing frame does not come again fails.
    """

    def __init__(self, scheduler: Scheduler, broadcast: Callable[[Exchange, bytes], None]) -> None:
        self._scheduler = scheduler
        self._broadcast = broadcast
        self._lock = threading.RLock()
        """Reentrant: the garbage collector cancels a forgotten stream in the middle of whatever runs."""
        self._cancelled: dict[str | None, dict[str, int]] = {}
        """By node: requests, each with the last attempt that is cancelled."""
        self._missed: dict[str, str] = {}
        """By node: the reply queue that lacks a frame."""

    def cancel(self, request_id: str, orphan: CancelOrphan) -> None:
        """Cancel this attempt and all earlier ones of that request."""
        with self._lock:
            self._schedule()
            requests = self._cancelled.setdefault(orphan.node, {})
            requests[request_id] = max(orphan.attempt, requests.get(request_id, 0))

    def ask_again(self, reply_to: str, node: str) -> None:
        """Ask a node to send again what it sent last into this reply queue: a frame of it never arrived."""
        with self._lock:
            self._schedule()
            self._missed[node] = reply_to

    def _schedule(self) -> None:
        if not (self._cancelled or self._missed):
            self._scheduler.soon(self._publish)

    def _publish(self) -> None:
        with self._lock:
            # In one statement: what a finalizer adds in between must not be left behind, with nothing scheduled.
            cancelled, missed, self._cancelled, self._missed = self._cancelled, self._missed, {}, {}
        messages = [ControlMessage(node=node, missed=reply_to) for node, reply_to in missed.items()]
        for node, requests in cancelled.items():
            listed = list(requests.items())
            for first in range(0, len(listed), MAX_IN_ONE_MESSAGE):
                messages.append(ControlMessage(node=node, cancelled=listed[first : first + MAX_IN_ONE_MESSAGE]))
        try:
            for message in messages:
                self._broadcast(cancel_exchange(), message.encode())
        except Exception as error:
            log.debug("a cancel was not published: %s", type(error).__name__)
