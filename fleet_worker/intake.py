"""From which lanes a node takes work at the moment."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from celery import Celery, bootsteps
from celery.worker import state as celery_state

from fleet_worker.lanes import Transport, lane_queue

__all__ = ["Intake"]

log = logging.getLogger(__name__)


class Intake:
    """Joins and leaves lanes while the worker runs, from any thread; it keeps to them when the broker comes back.

    A worker begins with none. Within a second of leaving, nothing more is taken; what was popped in that second goes
    back to its lane.
    """

    def __init__(self, app: Celery, transport: Transport) -> None:
        self._app = app
        self._transport = transport
        self._wanted: frozenset[str] = frozenset()
        self._consumer: Any = None
        self._settled = threading.Event()
        app.steps["consumer"].add(self._step())

    @property
    def lanes(self) -> frozenset[str]:
        return self._wanted

    @property
    def held(self) -> int:
        """Messages that were taken and are not done, whether or not their tasks have begun."""
        return len(celery_state.reserved_requests)

    def follow(self, lanes: Iterable[str]) -> None:
        """Take work from these lanes and no others."""
        self._wanted = frozenset(lanes)
        self._settled.clear()
        if self._consumer:
            self._consumer.call_soon(self._apply)

    def settled(self, timeout: float) -> bool:
        """Wait until the last `follow` has been followed, or for so many seconds; the broker may be away."""
        return self._consumer is None or self._settled.wait(timeout)

    def _step(self) -> type[bootsteps.StartStopStep]:
        """Celery makes a new consumer for each connection to the broker, and tells its steps."""
        intake = self

        class Lanes(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.tasks:Tasks",)

            def start(self, consumer: Any) -> None:
                intake._consumer = consumer
                # Not now: what RabbitMQ delivers before the event loop runs has no callback yet, and is never handled.
                consumer.call_soon(intake._apply)

        return Lanes

    def _apply(self) -> None:
        """In the thread of Celery's event loop, where kombu may be used; an exception here would end the worker."""
        queues, consumer, wanted = self._app.amqp.queues, self._consumer, self._wanted
        try:
            for name in queues.keys() - wanted:
                if consumer.task_consumer.consuming_from(name):
                    consumer.cancel_task_queue(name)
            for name in sorted(wanted):
                if name not in queues:
                    queues.add(lane_queue(name, self._transport))
                consumer.add_task_queue(name)
            if wanted is self._wanted:
                self._settled.set()
        except Exception as error:  # the connection is lost: Celery will notice, and start the step again
            log.debug("lanes are joined later: %s", type(error).__name__)
