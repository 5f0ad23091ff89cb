"""From which lanes a node takes work at the moment."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from celery import Celery, bootsteps
from celery.worker import state as celery_state

from fleet_worker.broker.topology import Transport, lane_queue

log = logging.getLogger(__name__)

TRY_AGAIN_AFTER = 2.0
"""Seconds until a lane that could not be joined is tried again."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """The lanes that work is to be taken from. One that another replaced may never be fulfilled."""

    lanes: frozenset[str] = frozenset()
    fulfilled: threading.Event = field(default_factory=threading.Event)


class LaneConsumer:
    """Joins and leaves lanes while the worker runs, from any thread, and tries until it has: when the broker comes
    back, and when it refuses.

    A worker begins with none. Within a second of leaving, nothing more is taken; what was popped in that second goes
    back to its lane.
    """

    def __init__(self, app: Celery, transport: Transport) -> None:
        self._app = app
        self._transport = transport
        self._wish = _Wish()
        self._has: frozenset[str] = frozenset()
        self._consumer: Any = None
        self._timer: Any = None
        self._refused: frozenset[str] = frozenset()
        app.steps["consumer"].add(self._step())

    @property
    def wanted(self) -> frozenset[str]:
        """The lanes that it is to take work from."""
        return self._wish.lanes

    @property
    def lanes(self) -> frozenset[str]:
        """Those of them that it has joined; none while the broker is away."""
        return self._has & self.wanted

    @property
    def held(self) -> int:
        """Messages that were taken and are not done, whether or not their tasks have begun."""
        return len(celery_state.reserved_requests)

    def follow(self, lanes: Iterable[str]) -> None:
        """Take work from these lanes and no others."""
        self._wish = _Wish(frozenset(lanes))
        if self._consumer:
            self._consumer.call_soon(self._apply_in, 0.0)

    def settled(self, timeout: float) -> bool:
        """Wait until the last `follow` has been followed, or for so many seconds; the broker may be away."""
        return self._consumer is None or self._wish.fulfilled.wait(timeout)

    def _step(self) -> type[bootsteps.StartStopStep]:
        """Celery makes a new task consumer for each connection to the broker, and tells its steps."""
        intake = self

        class Lanes(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.tasks:Tasks",)

            def start(self, consumer: Any) -> None:
                intake._consumer = consumer
                # Not now: what RabbitMQ delivers before the event loop runs has no callback yet, and is never handled.
                consumer.call_soon(intake._apply_in, 0.0)

            def stop(self, consumer: Any) -> None:
                """Celery would join the old lanes by itself, all or none."""
                intake._has = frozenset()
                intake._app.amqp.queues.deselect(list(intake._app.amqp.queues))

        return Lanes

    def _apply_in(self, seconds: float) -> None:
        """By the event loop's timer: there the loss of the connection reaches Celery, which opens another, and no other
        error does harm."""
        if self._timer:
            self._timer.cancel()
        self._timer = self._consumer.timer.call_after(seconds, self._apply)

    def _apply(self) -> None:
        """In the thread of Celery's event loop, where kombu may be used."""
        if not self._consumer.task_consumer:  # the worker ends
            return
        wish = self._wish
        try:
            refused = self._change(wish.lanes)
        except self._consumer.channel_errors as error:  # nothing is consumed any more
            raise ConnectionResetError(f"the broker closed the channel ({type(error).__name__})") from error
        wish.fulfilled.set()
        self._tell(refused)
        if refused:
            self._apply_in(TRY_AGAIN_AFTER)

    def _change(self, wanted: frozenset[str]) -> dict[str, Exception]:
        for name in self._joined() - wanted:
            self._consumer.cancel_task_queue(name)
        refused = self._join(sorted(wanted - self._joined()))
        self._has = self._joined()
        return refused

    def _joined(self) -> frozenset[str]:
        return frozenset(filter(self._consumer.task_consumer.consuming_from, self._app.amqp.queues))

    def _join(self, lanes: list[str]) -> dict[str, Exception]:
        """Return those that the broker refuses, and why.

        For a queue that is declared otherwise than it is, RabbitMQ closes the channel, and with it everything that the
        channel consumes. So each is first declared on a channel that has nothing to lose.
        """
        refused: dict[str, Exception] = {}
        if lanes:
            with self._consumer.connection.channel() as channel:
                for name in lanes:
                    queue = lane_queue(name, self._transport)
                    try:
                        queue(channel).declare()
                    except self._consumer.channel_errors as error:
                        refused[name] = error
                    else:
                        self._app.amqp.queues.add(queue)
                        self._consumer.add_task_queue(name)
        return refused

    def _tell(self, refused: dict[str, Exception]) -> None:
        for name in sorted(refused.keys() - self._refused):
            log.warning("lane %s cannot be joined, and is tried again: %s", name, type(refused[name]).__name__)
        for name in sorted(self._refused & self.lanes):
            log.warning("lane %s is joined now", name)
        self._refused = frozenset(refused)
