"""The router's end of the reply protocol: one reply queue, and the thread that listens to it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from kombu import Connection, Consumer, Queue
from kombu.transport.redis import Channel as RedisChannel

from fleet_worker.broker.connection import hear, is_away, open_channel, refuses, unavailable
from fleet_worker.broker.publisher import Publisher
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import listening_key, reply_queue
from fleet_worker.errors import Cancelled, InvalidRequest, where
from fleet_worker.protocol.reply import Frame, Reply
from fleet_worker.protocol.wire import PROTOCOL_VERSION

log = logging.getLogger(__name__)

LONGEST_LOOK = 1.5
"""Seconds of the inbox's clock that one look for messages may count, however long the process was frozen in it."""
PROVE_EVERY = 1.0
"""Seconds after which an inbox asks the broker whether it is still there."""
PRESENCE = 6
"""Seconds for which Redis remembers that a router listens."""


class ReplyConsumer:
    """One reply queue, one thread and one connection for all requests of a router: each frame that comes is handed to
    `receive`, with the name of its node.

    `also` is a subscription that the same thread listens to: a maker of its queue, and what takes its messages.
    `listening` is called with a channel each time it has begun to listen, and with whether it had listened before.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        broker_url: str,
        name: str,
        receive: Callable[[str, Frame], object],
        *,
        also: tuple[Callable[[], Queue], Callable[[Any], None]] | None = None,
        listening: Callable[[Any, bool], None] = lambda channel, again: None,
    ) -> None:
        self.name = name
        self._also = also
        self._on_listening = listening
        self._connect = connect
        self._broker_url = broker_url
        self._link = ReconnectingThread("the reply queue", connect, self._listen, self._failed)
        self._queue = reply_queue(name)
        self._take = receive
        self.clock = 0.0
        """Seconds of listening so far. It stands still while the broker, or this process, does nothing."""
        self._back = 0.0
        """When it last began to listen, on this clock."""
        self._listening, self._decided = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        """The last one before it listened."""
        self._next_proof = 0.0

    def start(self, timeout: float, *, waited: float = 0.0) -> None:
        """Listen; raises `BrokerUnavailable` if the broker is not there within `timeout` seconds, some of which may
        have been waited already, or at once if it refuses, and `Cancelled` if it is closed meanwhile."""
        if waited < timeout:
            self._link.start()
        self._decided.wait(timeout - waited)
        if self._link.closed.is_set():
            raise Cancelled("the router was closed")
        if not self._listening.is_set():
            self._link.close()
            said, cause = f"did not answer within {timeout:.3g} s", self._failure
            retryable = cause is None or is_away(cause)
            raise unavailable(self._broker_url, said, cause or "no answer", retryable=retryable)

    def close(self) -> None:
        """Stop listening and delete the reply queue."""
        self._link.close()
        self._decided.set()
        if self._listening.is_set():
            self._wake_up()
            self._link.close(timeout=5.0)

    def silence(self, since: float) -> float:
        """Seconds for which it has listened without a break since this moment of its clock."""
        return self.clock - max(since, self._back)

    def _failed(self, error: Exception) -> None:
        if not self._listening.is_set():
            self._failure = error
            if refuses(error):
                self._decided.set()

    def _listen(self, connection: Connection) -> None:
        channel = open_channel(connection)
        consumer = Consumer(channel, [self._queue], on_message=self._receive)
        consumer.consume()
        if self._also:
            new_queue, take = self._also
            Consumer(channel, [new_queue()], on_message=take, no_ack=True).consume()
        hear(connection, 0.01)  # only now kombu's Redis transport subscribes
        self._on_listening(channel, self._listening.is_set())
        self._back, self._next_proof = self.clock, 0.0
        self._prove(channel)  # before anything is asked, or a node might take this router for gone
        self._link.works()
        self._listening.set()
        self._decided.set()
        while not self._link.closed.is_set():
            self._prove(channel)
            before = time.monotonic()
            hear(connection, 1.0)
            self.clock += min(time.monotonic() - before, LONGEST_LOOK)
        with contextlib.suppress(Exception):  # it all expires anyway
            self._leave(consumer, channel)

    def _leave(self, consumer: Consumer, channel: Any) -> None:
        consumer.cancel()
        self._queue.bind(channel).delete()
        if isinstance(channel, RedisChannel):
            with channel.conn_or_acquire() as client:
                client.delete(listening_key(self.name))

    def _prove(self, channel: Any) -> None:
        """Ask the broker something: a line that was cut brings no messages, and no errors either. Meanwhile the clock
        stands still. On Redis this says that the router listens, so that nodes work for it; RabbitMQ knows that."""
        if time.monotonic() < self._next_proof:
            return
        if isinstance(channel, RedisChannel):
            with channel.conn_or_acquire() as client:
                client.set(listening_key(self.name), 1, ex=PRESENCE)
        else:
            self._queue.bind(channel).queue_declare(passive=True)
        self._next_proof = time.monotonic() + PROVE_EVERY

    def _receive(self, message: Any) -> None:
        try:
            reply = Reply.decode(message.body)
        except InvalidRequest as error:
            log.error("a message in the reply queue was dropped: %s", error)
        else:
            for frame in reply.frames:
                self._hand_on(reply.node, frame)
        message.ack()

    def _hand_on(self, node: str, frame: Frame) -> None:
        try:
            self._take(node, frame)
        except Exception as error:  # the broker would deliver it again, for ever
            log.error("a frame of %s (%s) was dropped: %s at %s", node, frame.kind, type(error).__name__, where(error))

    def _wake_up(self) -> None:
        """An empty reply to ourselves ends the wait in `drain_events` at once."""
        with contextlib.suppress(Exception), self._connect() as connection:
            empty = Reply(v=PROTOCOL_VERSION, node="", frames=[]).encode()
            Publisher(lambda: connection).publish(empty, routing_key=self.name, declare=reply_queue)
