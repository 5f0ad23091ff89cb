"""Publishes what the nodes of a host tell about their prompt caches, while a router wants to know it.

Best effort, and in a thread of its own: no registry event fails with it.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable

from fleet_worker.broker.door import Refused
from fleet_worker.broker.outage import Outage
from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.cache_digest import LEASE, MOST_DIGESTS, CacheDigest, DigestMessage, DigestsWanted

log = logging.getLogger(__name__)

SHORTEST_INTERVAL = 1.0
"""Seconds. With digests every second, several routers place requests as well as one that knows all caches; with one
every 5 s almost as well (simulated)."""
MESSAGES_A_SECOND = 200
"""What a router hears at most from all hosts together."""
LONGEST_INTERVAL = 60.0
"""Seconds, however many hosts a message says that there are."""


class DigestPace:
    """When the digests of a host are due. Times are seconds of `clock`. For one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._draw = draw
        """Returns a number from 0 to 1."""
        self._wanted_until = -math.inf
        self._hosts = 0
        """The largest number that a router has said, until `_hosts_until`."""
        self._hosts_until = -math.inf
        self._not_before = self._published_at = -math.inf
        self._is_due = False
        """Whether it is to be published without a change, too."""
        self._published: list[CacheDigest] = []

    @property
    def interval(self) -> float:
        """Seconds from one message to the next, at least."""
        return max(SHORTEST_INTERVAL, self._spread)

    @property
    def _spread(self) -> float:
        """Seconds in which all hosts together may publish once."""
        return min(LONGEST_INTERVAL, self._hosts / MESSAGES_A_SECOND)

    @property
    def is_wanted(self) -> bool:
        return self._clock() < self._wanted_until

    def extend(self, wanted: DigestsWanted) -> None:
        """A router wants digests. All hosts hear it together, so a first message waits for a random time."""
        now, is_first = self._clock(), not self.is_wanted
        until = now + min(wanted.seconds, LEASE)
        self._wanted_until = max(self._wanted_until, until)
        if wanted.hosts >= self._hosts or now >= self._hosts_until:
            self._hosts, self._hosts_until = wanted.hosts, until
        if is_first or wanted.at_once:
            if is_first or not self._is_due:  # else one that asks again and again would delay it
                self._not_before = now + self._draw() * self._spread
            self._is_due = True

    def beat(self) -> None:
        """Publish as soon as it is allowed, also without a change."""
        self._is_due = True

    def due_in(self, digests: list[CacheDigest]) -> float:
        """Return after how many seconds these are to be published: 0 for now, infinity if nothing has changed."""
        runs_something = any(digest.running for digest in digests)
        if not self.is_wanted or not (self._is_due or runs_something or digests != self._published):
            return math.inf
        return max(0.0, max(self._not_before, self._published_at + self.interval) - self._clock())

    def publishing(self, digests: list[CacheDigest]) -> None:
        self._is_due, self._published = False, digests
        self._published_at = self._clock()


class DigestPublisher:
    """One thread. It calls `digests` for what the nodes told last, and `publish` with a message, which may raise any
    error. No method waits for either."""

    def __init__(
        self,
        publish: Callable[[bytes], object],
        host: str,
        digests: Callable[[], list[CacheDigest]],
        pace: DigestPace | None = None,
    ) -> None:
        self._publish = publish
        self._host = host
        self._digests = digests
        self._lock = threading.Lock()
        self._pace = pace or DigestPace()
        self._changed = threading.Event()
        self._closed = threading.Event()
        # That the broker is away is logged by others of this process.
        self._outage = Outage("digests of prompt caches: the broker", log, is_quiet=lambda: True)
        self._thread = threading.Thread(target=self._run, name="fleet-digests", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def receive(self, body: bytes) -> None:
        """Take the message of a router that wants digests; raises `Refused`."""
        try:
            wanted = DigestsWanted.decode(body)
        except InvalidRequest:
            raise Refused("it is no question to a registry node") from None
        with self._lock:
            self._pace.extend(wanted)
        self._changed.set()

    def beat(self) -> None:
        """Publish once with each readiness beat, so that what a router has missed is repaired."""
        with self._lock:
            self._pace.beat()
        self._changed.set()

    def changed(self) -> None:
        """A node told something new."""
        self._changed.set()

    def close(self, timeout: float = 0.0) -> None:
        self._closed.set()
        self._changed.set()
        if timeout and self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._closed.is_set():
            digests = self._digests()[:MOST_DIGESTS]
            with self._lock:
                seconds = self._pace.due_in(digests)
                if not seconds:
                    self._pace.publishing(digests)
            if not seconds:
                self._send(digests)
            else:
                self._changed.wait(None if seconds == math.inf else seconds)
            self._changed.clear()

    def _send(self, digests: list[CacheDigest]) -> None:
        try:
            message = DigestMessage(v=1, host=self._host, interval=self._pace.interval, digests=digests)
            self._publish(message.encode())
        except Exception as error:
            self.beat()
            self._closed.wait(self._outage.failed(error))
        else:
            self._outage.works()
