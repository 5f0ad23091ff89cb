"""Celery's consumer in a node: how it sends the task events that Flower shows."""

from __future__ import annotations

from typing import Any

from fleet_worker.node import log_privacy

FLUSH_AFTER = 0.2
"""Seconds for which task events gather. Celery publishes them in each turn of its event loop: three messages for every
request, an eighth of what a node does at 300 requests a second."""


class Consumer(log_privacy.Consumer):
    """Sends task events in batches, always from the thread of its event loop, on the connection that it reads from."""

    _is_flush_due = False

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        # RabbitMQ: a confirmation would be waited for inside the event loop, and nobody needs one of an event.
        options = {"confirm_publish": False}
        return self.ensure_connected(self.app.connection_for_read(heartbeat=heartbeat, transport_options=options))

    def connection_for_write(self, url: str | None = None, heartbeat: float | None = None) -> Any:
        """Return the connection that it reads from. Celery opens another for events."""
        return self.connection

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        self._is_flush_due = False  # a flush that was due is lost with the connection

    def on_send_event_buffered(self) -> None:
        """Called in the thread of a task; only the event loop's own thread may use its timers."""
        if not self._is_flush_due:
            self._is_flush_due = True
            self.hub.call_soon(self.hub.call_later, FLUSH_AFTER, self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self.event_dispatcher:
            self.event_dispatcher.flush()
