"""The router's end of digests of prompt caches: it tells all hosts that it wants them, and receives them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from kombu import Connection, Consumer, Producer

from fleet_worker.broker.connection import check_alive, close_idle, open_channel, receive_all
from fleet_worker.broker.control_listener import PING_EVERY
from fleet_worker.broker.door import Refused
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import Transport, ask_exchange, digest_queue
from fleet_worker.errors import where
from fleet_worker.protocol.cache_digest import LEASE, DigestMessage, DigestsWanted
from fleet_worker.protocol.registry_event import READINESS, RegistryEvent
from fleet_worker.registry.view import Registry
from fleet_worker.router.first_digests import FirstDigests
from fleet_worker.router.submitter import publish

AGAIN_AFTER = 1.0
"""Seconds from a new connection, after a lost one, to the first request: hosts must find the broker again, too."""
REPEAT_EVERY = LEASE / 3
SOONEST = 5.0
"""Seconds between two requests, if only a few hosts have come or gone."""
FEW = 100
"""Hosts, up to which all publish as often as they may: how many they are makes no difference."""
LONG_WAIT, SHORT_WAIT = 0.5, 0.02
"""Seconds of one wait for messages; the short one until the first digests have come, as requests may wait for them."""
GAP = 0.1
"""Seconds between two reads. One message that is read alone costs three times as much as one of several (measured)."""


class DigestRequests:
    """When a router asks for digests: soon after it has connected, every 30 s, when the number of hosts has changed,
    and when an instance has become available: its registry node may be a new process, which knows of no request.
    """

    def __init__(self, hosts: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._hosts = hosts
        self._clock = clock
        self._due_at = math.inf
        self._sent_at = -math.inf
        self._said = 0
        """The number of hosts in the last request."""
        self._is_new = True
        """Nothing was asked since it has connected."""
        self._has_host_come = False

    def connected(self, *, again: bool = False) -> None:
        """What was published before this connection is missing."""
        self._is_new, self._due_at = True, self._clock() + (AGAIN_AFTER if again else 0.0)

    def hear(self, event: RegistryEvent) -> None:
        """Called with each change in the registry, in the thread that receives replies."""
        if event.model == READINESS and event.event_type == "offering_available":
            self._has_host_come = True

    def next(self) -> DigestsWanted | None:
        """Return the request that is to be published now, if one is."""
        now, hosts = self._clock(), self._hosts()
        if now < self._due_at and (self._is_new or not self._cannot_wait(hosts, now - self._sent_at)):
            return None
        wanted = DigestsWanted(v=1, hosts=hosts, seconds=LEASE, at_once=self._is_new)
        self._sent_at, self._due_at, self._said = now, now + REPEAT_EVERY, hosts
        self._is_new = self._has_host_come = False
        return wanted

    def _cannot_wait(self, hosts: int, since: float) -> bool:
        """Return whether the next request must come before it is due. `since`: seconds since the last one."""
        now, said = max(FEW, hosts), max(FEW, self._said)
        if now >= 2 * said or said >= 2 * now:
            return True
        return since >= SOONEST and (self._has_host_come or abs(now - said) > said / 10)


class DigestConsumer:
    """One thread and one connection, apart from those of the replies, which must neither wait for digests nor end with
    them. `receive` is called with each message; it may raise `Refused`.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        transport: Transport,
        registry: Registry,
        receive: Callable[[bytes], object],
    ) -> None:
        self._transport = transport
        self._registry = registry
        self._receive = receive
        self._take = partial(_take, self._hear)
        self.first = FirstDigests(lambda: registry.hosts)
        self._requests = DigestRequests(lambda: registry.hosts)
        self._unsubscribe: Callable[[], None] = lambda: None
        # That the broker is away is logged by the thread of the replies.
        self._thread = ReconnectingThread("digests of prompt caches", connect, self._listen, is_quiet=True)

    def start(self) -> None:
        self._unsubscribe = self._registry.subscribe(self._requests.hear)
        self._thread.start()

    def close(self) -> None:
        """Return at once. The thread ends within a second."""
        self.first.end()
        self._unsubscribe()
        self._thread.close()

    def _listen(self, connection: Connection) -> None:
        options = {"health_check_interval": PING_EVERY}
        connection.transport_options = {**connection.transport_options, **options}
        channel = open_channel(connection)
        if self._transport == "amqp":
            connection.connection.transport.read_ahead()
        Consumer(channel, [digest_queue(self._transport)], on_message=self._take, no_ack=True).consume()
        receive_all(connection, 0.01)  # only now kombu's Redis transport subscribes
        if not self.first.is_over and not self._registry.wait_for_answers().hosts:
            self.first.end()  # there is nobody to wait for
        self._requests.connected(again=self.first.is_over)
        close_idle(channel)
        while not self._thread.closed.is_set():
            if wanted := self._requests.next():
                publish(Producer(channel), ask_exchange(), wanted.encode())
                close_idle(channel)
                self.first.asked()
            receive_all(connection, LONG_WAIT if self.first.is_over else SHORT_WAIT)
            check_alive(connection, channel)
            self._thread.works()
            if self.first.is_over:
                self._thread.closed.wait(GAP)
            else:
                self.first.check()

    def _hear(self, body: bytes) -> None:
        self._receive(body)
        if not self.first.is_over:
            self.first.heard(DigestMessage.decode(body).host)


def _take(receive: Callable[[bytes], object], message: Any) -> None:
    """Raises `Refused`, whatever fails: any other error would end the connection."""
    try:
        receive(message.body)
    except Refused:
        raise
    except Exception as error:
        raise Refused("a digest could not be used", f"{type(error).__name__} at {where(error)}") from None
