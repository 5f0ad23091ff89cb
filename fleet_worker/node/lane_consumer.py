"""Joins and leaves lanes while the worker runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from celery import Celery, bootsteps

from fleet_worker.broker.topology import Transport, lane_queue

log = logging.getLogger(__name__)

TRY_AGAIN_AFTER = 2.0
"""Seconds until a lane that could not be joined is tried again."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A target set of lanes. `fulfilled` is set once the consumer has applied it; never for one that was replaced
    before."""

    lanes: frozenset[str] = frozenset()
    fulfilled: threading.Event = field(default_factory=threading.Event)


class LaneConsumer:
    """Makes Celery's consumer consume a set of lanes, none at first. Safe for all threads.

    A lane that cannot be joined is tried again: when the broker is back, and every `TRY_AGAIN_AFTER` seconds if it
    refuses. Within a second after a lane was left nothing more is taken from it; a message that is taken in that
    second goes back to it.
    """

    def __init__(self, app: Celery, transport: Transport) -> None:
        self._app = app
        self._transport = transport
        self._target = _Target()
        self._joined: frozenset[str] = frozenset()
        self._refused: frozenset[str] = frozenset()
        self._consumer: Any = None
        self._timer: Any = None
        app.steps["consumer"].add(self._step())

    @property
    def wanted(self) -> frozenset[str]:
        """The lanes that are to be consumed."""
        return self._target.lanes

    @property
    def lanes(self) -> frozenset[str]:
        """Those of them that have been joined; none while the broker is away."""
        return self._joined & self.wanted

    def consume(self, lanes: Iterable[str]) -> None:
        """Consume these lanes and no others."""
        self._target = _Target(frozenset(lanes))
        if self._consumer:
            self._consumer.call_soon(self._apply_in, 0.0)

    def wait_until_settled(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until the last `consume` is applied; the broker may be away."""
        return self._consumer is None or self._target.fulfilled.wait(timeout)

    def _step(self) -> type[bootsteps.StartStopStep]:
        """Return a step that Celery starts with each connection to the broker, which has a new task consumer."""
        lane_consumer = self

        class Lanes(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.tasks:Tasks",)

            def start(self, consumer: Any) -> None:
                lane_consumer._consumer = consumer
                # Not now: what RabbitMQ delivers before the event loop runs has no callback yet, and is never handled.
                consumer.call_soon(lane_consumer._apply_in, 0.0)

            def stop(self, consumer: Any) -> None:
                """Let Celery join no lanes by itself: it would join the old ones, all or none."""
                lane_consumer._joined = frozenset()
                lane_consumer._app.amqp.queues.deselect(list(lane_consumer._app.amqp.queues))

        return Lanes

    def _apply_in(self, seconds: float) -> None:
        """Use the event loop's timer: there Celery notices a lost connection and opens another, and no other error
        does harm."""
        if self._timer:
            self._timer.cancel()
        self._timer = self._consumer.timer.call_after(seconds, self._apply)

    def _apply(self) -> None:
        """Runs in the thread of Celery's event loop, the only one that may use the consumer."""
        if not self._consumer.task_consumer:  # the worker ends
            return
        target = self._target
        try:
            for name in self._consuming() - target.lanes:
                self._consumer.cancel_task_queue(name)
            refused = self._join(sorted(target.lanes - self._consuming()))
            self._joined = self._consuming()
        # Nothing is consumed any more. A closed channel of kombu has lost what it needs: AttributeError.
        except (*self._consumer.channel_errors, AttributeError) as error:
            raise ConnectionResetError(f"the broker closed the channel ({type(error).__name__})") from error
        target.fulfilled.set()
        self._log_refused(refused)
        if refused:
            self._apply_in(TRY_AGAIN_AFTER)

    def _consuming(self) -> frozenset[str]:
        return frozenset(filter(self._consumer.task_consumer.consuming_from, self._app.amqp.queues))

    def _join(self, lanes: list[str]) -> dict[str, Exception]:
        """Join these lanes; return those that the broker refuses, and why.

        RabbitMQ closes the channel for a queue that exists with other arguments, and with the channel everything that
        it consumes. So each queue is first declared on a channel of its own.
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

    def _log_refused(self, refused: dict[str, Exception]) -> None:
        for name in sorted(refused.keys() - self._refused):
            log.warning("lane %s cannot be joined, and is tried again: %s", name, type(refused[name]).__name__)
        for name in sorted(self._refused & self.lanes):
            log.warning("lane %s is joined now", name)
        self._refused = frozenset(refused)
