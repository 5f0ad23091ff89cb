"""What a router lets nodes know: what nobody waits for any more, and what it has missed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kombu import Connection, Exchange

from fleet_worker.broker.publisher import Publisher
from fleet_worker.broker.topology import cancel_exchange
from fleet_worker.protocol.control import ControlMessage
from fleet_worker.router.attempts import CancelOrphan
from fleet_worker.router.scheduler import Scheduler

log = logging.getLogger(__name__)

AT_A_TIME = 1_000
"""Requests in one message."""


class CancelPublisher:
    """Published soon, by the thread of the agenda, and best effort: what a node goes on with all the same is cancelled
    again with each sign of life that it gives of it, and what was missed for too long is a failed attempt.
    """

    def __init__(self, agenda: Scheduler, connect: Callable[[], Connection]) -> None:
        self._agenda = agenda
        self._publisher = Publisher(connect)
        self._lock = threading.RLock()
        """Reentrant: a forgotten stream is cancelled by the garbage collector, in the middle of whatever runs."""
        self._cancelled: dict[str | None, dict[str, int]] = {}
        self._missed: dict[str, str] = {}

    def cancel(self, request_id: str, orphan: CancelOrphan) -> None:
        """Nobody wants this attempt, nor earlier ones."""
        with self._lock:
            self._soon()
            requests = self._cancelled.setdefault(orphan.node, {})
            requests[request_id] = max(orphan.attempt, requests.get(request_id, 0))

    def missed(self, reply_to: str, node: str) -> None:
        """Something that this node sent into this reply queue never arrived."""
        with self._lock:
            self._soon()
            self._missed[node] = reply_to

    def close(self) -> None:
        """To be called when the agenda is closed."""
        self._publisher.close()

    def _soon(self) -> None:
        if not (self._cancelled or self._missed):
            self._agenda.soon(self._publish)

    def _publish(self) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, {}
            missed, self._missed = self._missed, {}
        try:
            for node, reply_to in missed.items():
                self._say(ControlMessage(node=node, missed=reply_to))
            for whom, requests in cancelled.items():
                listed = list(requests.items())
                for first in range(0, len(listed), AT_A_TIME):
                    self._say(ControlMessage(node=whom, cancelled=listed[first : first + AT_A_TIME]))
        except Exception as error:
            log.debug("a notice was not published: %s", type(error).__name__)
            self._publisher.drop()

    def _say(self, notice: ControlMessage) -> None:
        self._publisher.publish(notice.encode(), exchange=cancel_exchange().name, routing_key="", declare=_exchange)


def _exchange(_: str) -> Exchange:
    return cancel_exchange()
