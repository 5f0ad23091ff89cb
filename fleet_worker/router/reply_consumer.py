"""The router's end of the reply protocol: one reply queue and the thread that consumes it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from kombu import Connection, Consumer, Producer

from fleet_worker.broker import presence, replies
from fleet_worker.broker.connection import Publisher, open_channel
from fleet_worker.broker.door import Refused
from fleet_worker.broker.faults import is_away, needs_operator, unavailable
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import ask_exchange, cancel_exchange, registry_queue, reply_queue, transport_of
from fleet_worker.errors import BrokerUnavailable, Cancelled, InvalidRequest, where
from fleet_worker.protocol import clock
from fleet_worker.protocol.registry_event import WHOLE_STATUS
from fleet_worker.protocol.reply import Frame, Reply
from fleet_worker.protocol.request import ControlMessage
from fleet_worker.protocol.wire import PROTOCOL_VERSION
from fleet_worker.registry.view import Registry
from fleet_worker.router.submitter import publish
from fleet_worker.router.wakeups import Wakeups

log = logging.getLogger(__name__)

MAX_TICK = 1.5
"""Seconds that one wait for messages may add to the clock, however long the process was frozen in it."""
GAP_PER_REQUEST = 0.000125
SHORTEST_GAP, LONGEST_GAP = 0.001, 0.005
"""Seconds from one read to the next. They grow with the requests in flight, so that one read takes more messages. A gap
below the shortest is left out: with few requests no message waits. After a longer pause a message is read at once."""
TRY_FOR = 60.0
"""Seconds after the last request for which a broker that never answered is tried."""
PROBE_EVERY = 1.0
"""Seconds after which the broker is asked something, to find out whether it is still there."""


class ReplyConsumer:
    """One reply queue and one thread for all requests of a router. `receive` is called with each frame and its node.

    The same thread and connection bring the events of registry nodes to `registry`.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        broker_url: str,
        name: str,
        receive: Callable[[str, Frame], object],
        registry: Registry,
        in_flight: Callable[[], int] = lambda: 1,
    ) -> None:
        self.name = name
        self._connect = connect
        self._broker_url = broker_url
        self._on_frame = receive
        self._registry = registry
        self._in_flight = in_flight
        """Returns how many requests are in flight."""
        self._read_at = 0.0
        """When the first message of the last read was read, in `time.monotonic()` seconds."""
        self._is_first = True
        """The next message is the first of its read."""
        self.wakeups = Wakeups()
        self._link = ReconnectingThread("the reply queue", connect, self._listen, self._failed)
        self.clock = 0.0
        """Seconds of consuming so far. It stands still while the broker or this process is frozen or cut off."""
        self._began_at = 0.0
        """When it last began to consume, on this clock."""
        self._decided = threading.Event()
        """Set when it consumes, when the broker refuses, or when this is closed."""
        self._patient = True
        self._failure: Exception | None = None
        """The last one."""
        self._next_probe = 0.0
        self._away_since: float | None = None
        """time.monotonic() seconds: since when it has not consumed, although it was started."""
        self._is_started = False
        self._wanted_at = 0.0
        self.has_given_up = False
        """True if it has never consumed, and does not try any more."""

    def start(self, timeout: float, *, waited: float = 0.0, patient: bool = True) -> None:
        """Consume, from now on. It may be called again while the broker has not answered yet: that is tried for
        `TRY_FOR` seconds after the last call.

        Raises:
            BrokerUnavailable: the broker did not answer within `timeout` seconds, of which `waited` are over already;
                or it refuses, or without `patient` one try failed, which is raised at once.
            Cancelled: this was closed meanwhile.
        """
        self._patient, self._wanted_at = patient, time.monotonic()
        if not self._is_started:
            self._is_started, self._away_since = True, time.monotonic()
            self._link.start()
        self._decided.wait(max(0.0, timeout - waited))
        if self._link.closed.is_set() and not self.has_given_up:
            raise Cancelled("the router was closed")
        if self._link.worked.is_set():
            return
        if self._decided.is_set():
            self._give_up()
            raise self._unavailable("cannot be used", retryable=False)
        raise self._unavailable(f"did not answer within {round(timeout, 1):g} s")

    @property
    def away_for(self) -> float:
        """Seconds for which the broker has been away; 0 if it is not."""
        since = self._away_since
        return 0.0 if since is None or self.has_given_up else time.monotonic() - since

    def require_broker(self, patience: float) -> float:
        """Return for how many of `patience` seconds the broker may still be waited for; raises `BrokerUnavailable` if
        it has been away for as long."""
        if (away_for := self.away_for) < patience:
            return patience - away_for
        raise self._unavailable(f"has not answered for {away_for:.0f} s")

    def _unavailable(self, said: str, *, retryable: bool = True) -> BrokerUnavailable:
        cause = self._failure
        retryable = retryable and (cause is None or is_away(cause))
        return unavailable(self._broker_url, said, cause or "no answer", retryable=retryable)

    def _give_up(self) -> None:
        self.has_given_up = True
        self._link.close()

    def close(self) -> None:
        """Stop consuming and delete the reply queue."""
        self._link.close()
        self._decided.set()
        if self._link.worked.is_set():
            self._wake_up()
            self._link.close(timeout=5.0)

    def silence(self, since: float) -> float:
        """Return for how many seconds it has consumed without a break since that time of its clock."""
        return self.clock - max(since, self._began_at)

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        self._failure = error
        if self._link.worked.is_set():
            return
        if needs_operator(error) or not self._patient:
            self._decided.set()
        elif now > self._wanted_at + TRY_FOR:
            self._give_up()

    def _listen(self, connection: Connection) -> None:
        channel = open_channel(connection)
        receive_all = replies.consume(connection, channel, self.name, self._receive)
        events = registry_queue(transport_of(self._broker_url))
        Consumer(channel, [events], on_message=self._registry.receive, no_ack=True).consume()
        receive_all(0.01)  # only now kombu's Redis transport subscribes
        self._announce(channel)
        presence.appear(channel, self.name)  # before the first request, or nodes take this router for gone
        self._began_at, self._next_probe = self.clock, time.monotonic() + PROBE_EVERY
        self._link.works()
        self._away_since = None
        self._decided.set()
        while not self._link.closed.is_set():
            self._probe(channel)
            self._link.works()
            before = time.monotonic()
            self._wait_for_gap(before)
            self._is_first = True
            with self.wakeups.together():
                receive_all(1.0)
            self.clock += min(time.monotonic() - before, MAX_TICK)
        with contextlib.suppress(Exception):  # all of it expires
            self._leave(channel)

    def _wait_for_gap(self, now: float) -> None:
        """Wait until the gap after the last read is over, or this is closed."""
        gap = min(LONGEST_GAP, self._in_flight() * GAP_PER_REQUEST)
        if gap >= SHORTEST_GAP and (left := self._read_at + gap - now) > 0:
            self._link.closed.wait(left)

    def _announce(self, channel: Any) -> None:
        """Ask all registry nodes for the status of their hosts, so that none is unknown until its next event. After a
        lost connection ask the nodes for their latest frames: what was on its way, or waited in a queue that was
        deleted, is gone."""
        self._registry.note_asked()
        publish(Producer(channel), ask_exchange(), WHOLE_STATUS)
        if self._link.worked.is_set():
            notice = ControlMessage(missed=self.name, router=self.name, sent_at=clock.now())
            publish(Producer(channel), cancel_exchange(), notice.encode())

    def _leave(self, channel: Any) -> None:
        channel.basic_cancel(self.name)  # or RabbitMQ would tell that the queue is gone
        reply_queue(self.name)(channel).delete()
        presence.leave(channel, self.name)

    def _probe(self, channel: Any) -> None:
        """Raise an error if the broker does not answer: a network that was cut brings neither messages nor errors."""
        if time.monotonic() >= self._next_probe:
            presence.stay(channel, self.name)
            self._next_probe = time.monotonic() + PROBE_EVERY

    def _receive(self, body: bytes) -> None:
        """Take one message; raises `Refused`."""
        if self._is_first:
            self._read_at, self._is_first = time.monotonic(), False
        try:
            reply = Reply.decode(body)
        except InvalidRequest as error:
            raise Refused("it is no reply", str(error)) from None
        for frame in reply.frames:
            self._dispatch(reply.node, frame)

    def _dispatch(self, node: str, frame: Frame) -> None:
        try:
            self._on_frame(node, frame)
        except Exception as error:  # or the broker would deliver it again and again
            log.error("a frame of %s (%s) was dropped: %s at %s", node, frame.kind, type(error).__name__, where(error))

    def _wake_up(self) -> None:
        """Send an empty reply to this queue: it ends the wait for messages at once."""
        with contextlib.suppress(Exception), self._connect() as connection:
            empty = Reply(v=PROTOCOL_VERSION, node="", frames=[]).encode()
            sender = replies.sender_on(Publisher(lambda: connection).channel)
            sender.send(self.name, empty)
            sender.confirm()
