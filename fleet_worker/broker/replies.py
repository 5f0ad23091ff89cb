"""Both ends of a reply queue: how a node writes into it, and how its router reads at once all that has come.

A message is the JSON of a `protocol.reply.Reply`, and nothing else: on Redis an element of a list, without the JSON
that kombu wraps around a base64 of it; on RabbitMQ the body. Routers and nodes of version 0.1 wrap it on Redis: the
name of a reply queue tells whether its router reads the one or the other, and a router reads both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol

import amqp
from kombu import Connection, Producer
from kombu.transport.redis import Channel as RedisChannel
from redis.exceptions import NoPermissionError, ResponseError

from fleet_worker.broker.bounded_socket import packed
from fleet_worker.broker.connection import receive as receive_one
from fleet_worker.broker.door import Refused
from fleet_worker.broker.topology import expiry, is_plain, reply_queue

MOST_AT_ONCE = 200
"""Messages that are read at once: meanwhile the broker is asked nothing else, and no reader is woken."""
MOST_BYTES_AT_ONCE = 1024 * 1024
"""Bytes after which no further message of RabbitMQ is waited for. From Redis one after the other is read and used."""
PREFETCH = 2 * MOST_AT_ONCE
"""Messages that RabbitMQ sends before the first is acknowledged. Only the others count as waiting, so nodes see that a
router is behind once it has these: no more than are needed to read without a pause."""

Receive = Callable[[bytes], object]
"""Is called with each body, and may raise `Refused`."""


class Sender(Protocol):
    """Writes messages into reply queues, on one channel: each once the answer to the one before it was read. For one
    thread at a time. After an error, one of BROKER_ERRORS, it is of no use any more.
    """

    def is_free(self, reply_to: str) -> bool:
        """Return whether neither `confirm` nor `send` would wait for the broker now."""

    def send(self, reply_to: str, body: bytes) -> None:
        """Write a message; the broker need not write it to disk. On RabbitMQ it is dropped if there is no such queue
        any more."""

    def confirm(self) -> int | None:
        """Wait until the broker has the message. Return how many wait in its queue now, None if it does not tell."""


def sender_on(channel: Any) -> Sender:
    """Return a sender, which keeps a connection of this channel for itself."""
    return _RedisSender(channel) if isinstance(channel, RedisChannel) else _RabbitMQSender(channel)


class _RedisSender:
    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._connection = channel.pool.get_connection()
        self._is_answer_due = False

    def is_free(self, reply_to: str) -> bool:
        # What can be read without an answer that is due is the end of the connection.
        return is_plain(reply_to) and self._connection.can_read(0) is self._is_answer_due

    def send(self, reply_to: str, body: bytes) -> None:
        if is_plain(reply_to):
            before, after = _commands(reply_to)
            command = b"%b$%d\r\n%b%b" % (before, len(body), body, after)
            self._connection.send_packed_command([command], check_health=False)
            self._is_answer_due = True
        else:
            _push_wrapped(self._channel, reply_to, body)

    def confirm(self) -> int | None:
        if not self._is_answer_due:
            return None
        waiting = self._connection.read_response()
        self._connection.read_response()  # of PEXPIRE
        self._is_answer_due = False
        return int(waiting)


@lru_cache(1_000)
def _commands(reply_to: str) -> tuple[bytes, bytes]:
    """Return LPUSH and PEXPIRE as Redis reads them: what is before the length of the body, and what is after it."""
    milliseconds = round(1000 * expiry(reply_to))
    lpush, pexpire = (b"LPUSH", reply_to.encode()), (b"PEXPIRE", reply_to.encode(), b"%d" % milliseconds)
    before, after = (b"".join(b"$%d\r\n%b\r\n" % (len(each), each) for each in words) for words in (lpush, pexpire))
    return b"*3\r\n" + before, b"\r\n*3\r\n" + after


def _push_wrapped(channel: Any, reply_to: str, body: bytes) -> None:
    """As routers of version 0.1 read it on Redis."""
    producer, json = Producer(channel, auto_declare=False), {"content_type": "application/json"}
    producer.publish(
        body, routing_key=reply_to, declare=[reply_queue(reply_to)(channel)], content_encoding="utf-8", **json
    )


class _RabbitMQSender:
    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def is_free(self, reply_to: str) -> bool:
        return False  # py-amqp waits for the confirmation of each message

    def send(self, reply_to: str, body: bytes) -> None:
        message = amqp.Message(body, content_type="application/json", content_encoding="utf-8", delivery_mode=1)
        self._channel.basic_publish(message, exchange="", routing_key=reply_to)

    def confirm(self) -> int | None:
        return None


def consume(connection: Connection, channel: Any, reply_to: str, receive: Receive) -> Callable[[float], None]:
    """Consume a reply queue; its name is the tag of the consumer, too.

    Return a function that waits so many seconds at most for messages of this connection, and calls `receive` with all
    replies that have come. What is refused is dropped and counted.
    """
    reply_queue(reply_to)(channel).declare()
    reader = _RedisReader if isinstance(channel, RedisChannel) else _RabbitMQReader
    return reader(connection, channel, reply_to, partial(_take, connection, receive)).receive_all


def _take(connection: Any, receive: Receive, item: bytes) -> None:
    try:
        receive(connection.door.open_reply(item))
    except Refused as refused:
        connection.door.drop(refused)


class _RedisReader:
    """Is called by our channel where kombu would ask for one element of a list, and read it.

    Redis before version 7 does not know BLMPOP, and a user may not be allowed it: then the first element is waited for
    with BRPOP, and the others are taken after it.
    """

    def __init__(self, connection: Connection, channel: Any, reply_to: str, take: Receive) -> None:
        self.receive_all = partial(receive_one, connection)
        self._key = reply_to
        self._take = take
        self._has_blmpop = True
        channel.reply_reader = self
        channel.basic_consume(reply_to, True, None, reply_to)

    def ask(self, connection: Any, timeout: float) -> None:
        if self._has_blmpop:
            command = packed("BLMPOP", timeout, 1, self._key, "RIGHT", "COUNT", MOST_AT_ONCE)
        else:
            command = packed("BRPOP", self._key, timeout)
        connection.send_packed_command(command)

    def read(self, connection: Any) -> None:
        """Read the answer; use each element before the next one is read, which may be as large again."""
        if not self._has_blmpop:
            self._read_more(connection)
            return
        try:
            for item in connection.elements(of_key=True):
                self._take(item)
        except ResponseError as error:
            if not isinstance(error, NoPermissionError) and "unknown command" not in str(error).lower():
                raise
            self._has_blmpop = False

    def _read_more(self, connection: Any) -> None:
        if first := connection.read_response(disable_decoding=True):
            self._take(first[1])
            connection.send_command("RPOP", self._key, MOST_AT_ONCE)
            for item in connection.elements():
                self._take(item)


class _RabbitMQReader:
    """Reads all messages that one read of the socket brings, and acknowledges them together."""

    def __init__(self, connection: Connection, channel: Any, reply_to: str, take: Receive) -> None:
        self._connection = connection
        self._channel = channel
        self._take = take
        self._messages: list[Any] = []
        self._bytes = 0
        self._amqp, self._socket = channel.connection, channel.connection.transport
        self._socket.read_ahead()
        channel.basic_qos(0, PREFETCH, False)
        channel.basic_consume(reply_to, consumer_tag=reply_to, callback=self._keep)

    def receive_all(self, timeout: float) -> None:
        if not self._messages:  # none came while the broker was asked something else
            receive_one(self._connection, timeout)
        while self._socket.has_more and len(self._messages) < MOST_AT_ONCE and self._bytes < MOST_BYTES_AT_ONCE:
            self._amqp.blocking_read()
        messages, self._messages, self._bytes = self._messages, [], 0
        for message in messages:
            self._take(message.body)
        if messages:
            self._channel.basic_ack(messages[-1].delivery_tag, multiple=True)

    def _keep(self, message: Any) -> None:
        self._messages.append(message)
        self._bytes += len(message.body)
