"""Publishes registry events, best effort: nothing waits for it, and nothing fails with it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from kombu import Connection

from fleet_worker.broker.connection import Publisher
from fleet_worker.broker.faults import describe
from fleet_worker.broker.topology import Transport, digest_exchange, registry_exchange
from fleet_worker.protocol.registry_event import Announcement

log = logging.getLogger(__name__)

PAUSE = 0.05
"""Seconds between two rounds: changes in the meantime share the next round."""


class RegistryPublisher:
    """One connection, and a thread which publishes in rounds. `announcements(kinds)` yields type and message of each
    event at the time of publishing; its iteration goes on when the broker has taken a message. A round that fails is
    given up, and its kinds are part of the next one.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        transport: Transport,
        announcements: Callable[[frozenset[str]], Iterable[tuple[str, Announcement]]],
        begun: Callable[[], object] = lambda: None,
    ) -> None:
        self._publisher = Publisher(connect)
        self._publishing = threading.Lock()
        """Held by the thread that uses the connection."""
        self._exchange = registry_exchange(transport)
        self._digest_exchange = digest_exchange()
        self._announcements = announcements
        self._begun = begun
        """Called once, when the broker has taken the first round."""
        self._wanted: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._closed = False
        self.failures = 0
        """Rounds that were given up since the start."""
        self.published_at: float | None = None
        """time.monotonic() of the last round that the broker took."""
        self._failed: frozenset[str] = frozenset()
        """The kinds of rounds that were given up since then."""
        self._thread = threading.Thread(target=self._run, name="fleet-registry-publisher", daemon=True)
        self._thread.start()

    def publish(self, *kinds: str) -> None:
        """Publish these kinds soon. Returns at once."""
        with self._changed:
            self._wanted |= frozenset(kinds)
            self._changed.notify()

    def publish_digest(self, body: bytes) -> None:
        """Publish a digest message now, in the thread of the caller; raises the error if the broker does not take it.
        It is no event: neither a round nor what is counted of rounds depends on it."""
        with self._publishing:
            if self._closed:
                return
            exchange = self._digest_exchange
            try:
                self._publisher.publish(body, exchange=exchange.name, routing_key="", declare=lambda _: exchange)
            except Exception:
                self._publisher.drop()
                raise

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
            with self._publishing:
                self._publish_round(kinds | self._failed)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, PAUSE)
        with self._publishing:
            self._publisher.close()

    def _publish_round(self, kinds: frozenset[str]) -> None:
        try:
            try:
                self._publish_all(kinds)
            except Exception:  # perhaps the broker closed the connection long ago
                self._publisher.drop()
                self._publish_all(kinds)
        except Exception as error:  # no request may fail with it
            if not self._failed:
                log.warning("registry events cannot be published and are dropped: the broker %s", describe(error))
            self.failures += 1
            self._failed = kinds
            self._publisher.drop()
        else:
            if self._failed:
                log.warning("registry events are published again")
            self._failed = frozenset()
            if self.published_at is None:
                self._begun()
            self.published_at = time.monotonic()

    def _publish_all(self, kinds: frozenset[str]) -> None:
        for event_type, announcement in self._announcements(kinds):
            self._publisher.publish(
                announcement.encode(),
                exchange=self._exchange.name,
                routing_key=f"llm.registry.{event_type}",
                declare=lambda _: self._exchange,
                type="llm.registry.event",
                app_id="fleet-worker-mlx",
            )
