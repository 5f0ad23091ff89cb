"""Publishes what a host has to tell, best effort: nothing waits for it, and nothing fails with it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from kombu import Connection

from fleet_worker.broker.publisher import Publisher
from fleet_worker.broker.topology import Transport, registry_exchange
from fleet_worker.protocol.registry_event import Announcement

log = logging.getLogger(__name__)

PAUSE = 0.05
"""Seconds between two rounds: what changes in the meantime travels together."""


class RegistryPublisher:
    """One thread and one connection. `announcements` makes the messages for the kinds that were asked for, at the
    moment at which they leave; of a round that the broker does not take, the kinds are said with the next one.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        transport: Transport,
        announcements: Callable[[frozenset[str]], Iterable[tuple[str, Announcement]]],
    ) -> None:
        self._publisher = Publisher(connect)
        self._exchange = registry_exchange(transport)
        self._announcements = announcements
        self._wanted: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._closed = False
        self.failures = 0
        """Rounds that were given up, in all."""
        self.published_at: float | None = None
        """Monotonic seconds at which the broker last took a round."""
        self._failing = False
        self._owed: frozenset[str] = frozenset()
        """The kinds of the rounds that were given up since then."""
        self._thread = threading.Thread(target=self._run, name="fleet-announcer", daemon=True)
        self._thread.start()

    def announce(self, *kinds: str) -> None:
        """Publish soon what there is to say of these kinds."""
        with self._changed:
            self._wanted |= frozenset(kinds)
            self._changed.notify()

    def close(self, timeout: float = 2.0) -> None:
        """Publish what is still wanted and end, within `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                kinds, self._wanted = self._wanted, frozenset()
            if not kinds:
                break
            self._round(kinds | self._owed)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, PAUSE)
        self._publisher.close()

    def _round(self, kinds: frozenset[str]) -> None:
        try:
            try:
                self._tell(kinds)
            except Exception:  # the connection, perhaps, which the broker had closed long ago
                self._publisher.drop()
                self._tell(kinds)
        except Exception as error:  # whatever it is, no request has to suffer from it
            self.failures += 1
            self._owed = kinds
            if not self._failing:
                log.warning("registry events cannot be published (%s), and are left out", type(error).__name__)
            self._failing = True
            self._publisher.drop()
        else:
            if self._failing:
                log.warning("registry events are published again")
            self._failing, self._owed = False, frozenset()
            self.published_at = time.monotonic()

    def _tell(self, kinds: frozenset[str]) -> None:
        for event_type, announcement in self._announcements(kinds):
            self._publish(event_type, announcement)

    def _publish(self, event_type: str, announcement: Announcement) -> None:
        self._publisher.publish(
            announcement.encode(),
            exchange=self._exchange.name,
            routing_key=f"llm.registry.{event_type}",
            declare=lambda _: self._exchange,
            type="llm.registry.event",
            app_id="fleet-worker-mlx",
        )
