"""What a router tells nodes beside requests: what is cancelled, still wanted or missing, and what its clock shows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from fleet_worker.broker.topology import cancel_exchange
from fleet_worker.protocol import clock
from fleet_worker.protocol.request import MOST_CANCELLED, ControlMessage
from fleet_worker.router.effects import AskAgain, CancelOrphan, Confirm, TellTime, ToNode
from fleet_worker.router.scheduler import Scheduler
from fleet_worker.router.submitter import Submitter

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Cancels that may wait to be published. Anybody may send replies to requests that do not exist; a request that does
exist is cancelled again."""
MOST_NAMED = 1_000
"""Nodes whose wrong clock is remembered, so that it is logged once."""


@dataclass(slots=True)
class _Notice:
    """What one node, or all, are to be told next. The attempts are by the id of their request."""

    cancelled: dict[str, int] = field(default_factory=dict)
    confirmed: dict[str, int] = field(default_factory=dict)
    missed: str | None = None
    """The reply queue that a frame of this node never reached."""


class ControlPublisher:
    """Collects what nodes are to be told; the scheduler thread publishes all of it together, at once.

    Best effort: if a node goes on with a cancelled request, the session cancels it again on each of its heartbeats, and
    an attempt whose missing frame does not come again fails.
    """

    def __init__(self, reply_to: str, submitter: Submitter, scheduler: Scheduler) -> None:
        self._reply_to = reply_to
        self._submitter = submitter
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._notices: dict[str | None, _Notice] = {}
        """By node; None for all nodes."""
        self._cancels = 0
        """The number of cancels in them."""
        self._named: set[str] = set()
        """Nodes whose wrong clock was logged."""

    def tell(self, request_id: str, effect: ToNode) -> None:
        """Tell a node, soon, what the state of this request asks for."""
        with self._lock:
            if isinstance(effect, CancelOrphan):
                if self._cancels >= MOST_WAITING:
                    return
                self._cancels += 1
            if not self._notices:
                self._scheduler.soon(self._publish)
            notice = self._notices.setdefault(effect.node, _Notice())
            match effect:
                case CancelOrphan(_, attempt):
                    notice.cancelled[request_id] = max(attempt, notice.cancelled.get(request_id, 0))
                case Confirm(_, attempt):
                    notice.confirmed[request_id] = attempt
                case AskAgain():
                    notice.missed = self._reply_to
                case TellTime(node):  # each message tells the time
                    self._log_wrong_clock(node)

    def _log_wrong_clock(self, node: str) -> None:
        if node not in self._named and len(self._named) < MOST_NAMED:
            self._named.add(node)
            log.warning("%s took a request for expired that is not: compare the clocks (fleet-worker status)", node)

    def _publish(self) -> None:
        with self._lock:
            notices, self._notices, self._cancels = self._notices, {}, 0
        try:
            for node, notice in notices.items():
                for message in self._messages(node, notice):
                    self._submitter.broadcast(cancel_exchange(), message.encode())
        except Exception as error:
            log.debug("a notice to nodes was not published: %s", type(error).__name__)

    def _messages(self, node: str | None, notice: _Notice) -> Iterator[ControlMessage]:
        nothing: list[tuple[str, int]] = []
        parts = zip_longest(_parts(notice.cancelled), _parts(notice.confirmed), fillvalue=nothing)
        for cancelled, confirmed in [*parts] or [(nothing, nothing)]:
            yield ControlMessage(
                node=node,
                cancelled=cancelled,
                confirmed=confirmed,
                missed=notice.missed,
                router=self._reply_to,
                sent_at=clock.now(),
            )
            notice.missed = None


def _parts(attempts: Mapping[str, int]) -> list[list[tuple[str, int]]]:
    listed = list(attempts.items())
    return [listed[first : first + MOST_CANCELLED] for first in range(0, len(listed), MOST_CANCELLED)]
