"""Celery's task events, which Flower shows, sent in batches."""

from __future__ import annotations

from typing import Any

from celery import bootsteps

FLUSH_AFTER = 0.2
MOST_EVENTS = 10_000
"""Celery sends a full buffer (of 24) from the thread that filled it, a task's: on AMQP that thread and the event loop
then use one connection at a time, and the node hangs."""


class BatchedEvents(bootsteps.StartStopStep):  # type: ignore[misc]
    """Lets task events gather for a moment.

    Celery publishes them in each turn of its event loop: three messages for every request, an eighth of what a node
    does at 300 requests a second.
    """

    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        self._waiting = False
        super().__init__(consumer, **kwargs)

    def start(self, consumer: Any) -> None:
        self._waiting = False
        if consumer.hub:
            consumer.event_dispatcher.buffer_limit = MOST_EVENTS
            consumer.event_dispatcher.on_send_buffered = lambda: self._gather(consumer)

    def _gather(self, consumer: Any) -> None:
        """Called in the thread that has an event to send; only the hub's own thread may touch its timers."""
        if not self._waiting:
            self._waiting = True
            consumer.hub.call_soon(consumer.hub.call_later, FLUSH_AFTER, self._flush, consumer)

    def _flush(self, consumer: Any) -> None:
        self._waiting = False
        if consumer.event_dispatcher:
            consumer.event_dispatcher.flush()
