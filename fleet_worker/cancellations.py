"""How a router lets nodes know what nobody waits for any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kombu import Connection, Exchange

from fleet_worker.agenda import Agenda
from fleet_worker.attempts import Leftover
from fleet_worker.lanes import cancel_exchange
from fleet_worker.messages import Cancellation
from fleet_worker.publisher import Publisher

__all__ = ["Cancellations"]

log = logging.getLogger(__name__)

AT_A_TIME = 1_000
"""Requests in one message."""


class Cancellations:
    """Published soon, by the thread of the agenda, and best effort: what a node goes on with all the same is cancelled
    again with each sign of life that it gives of it.
    """

    def __init__(self, agenda: Agenda, connect: Callable[[], Connection]) -> None:
        self._agenda = agenda
        self._publisher = Publisher(connect)
        self._lock = threading.RLock()
        """Reentrant: a forgotten stream is cancelled by the garbage collector, in the middle of whatever runs."""
        self._pending: dict[str | None, dict[str, int]] = {}

    def add(self, request_id: str, leftover: Leftover) -> None:
        """Nobody wants this attempt, nor earlier ones."""
        with self._lock:
            if not self._pending:
                self._agenda.soon(self._publish)
            requests = self._pending.setdefault(leftover.node, {})
            requests[request_id] = max(leftover.attempt, requests.get(request_id, 0))

    def close(self) -> None:
        """To be called when the agenda is closed."""
        self._publisher.close()

    def _publish(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
        try:
            for node, requests in pending.items():
                listed = list(requests.items())
                for first in range(0, len(listed), AT_A_TIME):
                    self._say(Cancellation(node=node, requests=listed[first : first + AT_A_TIME]))
        except Exception as error:
            log.debug("a cancellation was not published: %s", type(error).__name__)
            self._publisher.drop()

    def _say(self, cancellation: Cancellation) -> None:
        body = cancellation.model_dump_json().encode()
        self._publisher.publish(body, exchange=cancel_exchange().name, routing_key="", declare=_exchange)


def _exchange(_: str) -> Exchange:
    return cancel_exchange()
