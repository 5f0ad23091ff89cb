"""Tells the registry nodes of all hosts that this router wants digests of prompt caches (`protocol.cache_digest`)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

from fleet_worker.broker.topology import ask_exchange
from fleet_worker.protocol.cache_digest import LEASE, DigestsWanted
from fleet_worker.protocol.registry_event import READINESS, RegistryEvent
from fleet_worker.registry.view import Registry
from fleet_worker.router.reply_consumer import ReplyConsumer
from fleet_worker.router.scheduler import Scheduler
from fleet_worker.router.submitter import Submitter

CHECK_EVERY = 1.0
"""Seconds. The first request is sent so long after the router has connected: then it knows how many hosts there are."""
REPEAT_EVERY = LEASE / 3
SOONEST = 5.0
"""Seconds from one request to the next that is due to a host that came."""
FEW = 100
"""Hosts, up to which all publish as often as they may: how many they are makes no difference."""


class DigestRequests:
    """The thread of the scheduler sends a request every 30 s, when the router has connected again, when the number of
    hosts has doubled or halved, and when an instance became available: its registry node may be a new process, which
    knows nothing of earlier requests. Best effort.
    """

    def __init__(
        self,
        registry: Registry,
        replies: ReplyConsumer,
        submitter: Submitter,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._replies = replies
        self._submitter = submitter
        self._scheduler = scheduler
        self._clock = clock
        self._sent_at = -math.inf
        self._hosts = 0
        """As many as were named last."""
        self._connection = 0
        """The one for which digests were asked for last, counted from 1."""
        self._has_host_come = False
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._unsubscribe = self._registry.subscribe(self._on_event)
        self._check_later()

    def close(self) -> None:
        self._unsubscribe()

    def _on_event(self, event: RegistryEvent) -> None:
        """Called with each change, in the thread that receives replies."""
        if event.model == READINESS and event.event_type == "offering_available":
            self._has_host_come = True

    def _check_later(self) -> None:
        self._scheduler.at(time.monotonic() + CHECK_EVERY, self._check)

    def _check(self) -> None:
        self._check_later()
        if not self._replies.away_for and self._is_due():
            # A connection that was lost is an error of the broker's client library, not always one of kombu's.
            with contextlib.suppress(Exception):
                self._send()

    def _is_due(self) -> bool:
        since = self._clock() - self._sent_at
        hosts, named = max(FEW, self._registry.hosts), max(FEW, self._hosts)
        has_changed = hosts >= 2 * named or named >= 2 * hosts
        is_new = self._connection != self._replies.connections
        return is_new or has_changed or since >= REPEAT_EVERY or (self._has_host_come and since >= SOONEST)

    def _send(self) -> None:
        connection, hosts = self._replies.connections, self._registry.hosts
        wanted = DigestsWanted(v=1, hosts=hosts, seconds=LEASE, at_once=connection != self._connection)
        self._has_host_come = False
        self._submitter.broadcast(ask_exchange(), wanted.encode(), timeout=2.0)
        self._sent_at, self._hosts, self._connection = self._clock(), hosts, connection
