"""Connections to a broker that may be away, frozen, or behind a network that was cut."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from celery.utils.threads import bound_open_broker_sockets
from kombu import Connection, Producer, Queue
from kombu.exceptions import OperationalError
from kombu.transport.redis import Channel as RedisChannel

ANSWER_WITHIN = 5.0
"""Seconds after which a broker that does not answer counts as lost."""
PONG_WITHIN = 0.8
"""The part of that in which a PING to Redis has to be answered: it is sent after seconds of silence."""
HEARTBEAT = 5.0
"""Seconds between two AMQP heartbeats. RabbitMQ and its clients count each other as lost after two that are missing."""
BACK_OFF = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Seconds before each further try to reach a broker that is away; the last one from then on."""
CLOSE_WITHIN = 0.5
"""Seconds that each answer is waited for while a failed connection is closed."""
REMEMBERED = 10_000
"""Routing keys whose queue or exchange a publisher knows to be declared."""


def connect(connection: Connection, seconds: float) -> Connection:
    """Open the connection if it is not open, and limit each of its waits from now on. Return the connection.

    For a connection that one thread uses at a time. Without limits kombu may wait for RabbitMQ, or try to connect,
    for ever.

    Raises:
        one of BROKER_ERRORS: there is no broker, it does not answer within `seconds`, or it refuses.
    """
    if not connection.connected:
        connection.shared_socket = None  # its limits are its own
        limits = {"socket_timeout": seconds, "socket_connect_timeout": seconds}
        connection.transport_options = {**connection.transport_options, **limits}
        connection.connect_timeout = seconds
        connection.ensure_connection(max_retries=0)
    if connection.transport.driver_type == "redis":
        pool = connection.default_channel.pool
        pooled = pool.get_connection()
        pooled.socket_timeout = seconds
        pooled.update_current_socket_timeout(seconds)
        pool.release(pooled)
    else:
        connection.connection.sock.settimeout(seconds)
    return connection


def open_channel(connection: Connection) -> Any:
    """Return a channel on which nothing waits longer than `ANSWER_WITHIN` for the broker.

    The timeouts in Celery's transport options do as much, but py-amqp forgets its own in the middle of a message.
    """
    # By itself kombu would wait two seconds and try again.
    connection.ensure_connection(max_retries=0, reraise_as_library_errors=False)
    channel = connection.channel()
    bound_open_broker_sockets(connection, ANSWER_WITHIN)
    return channel


def call_when_opened_again(channel: Any, method: Callable[[Any], object]) -> None:
    """Have redis-py call a bound method when it opens the socket of short commands again, which it does between two
    commands without an error. An error of the method is raised by the command. RabbitMQ always raises one."""
    if isinstance(channel, RedisChannel):
        pooled = channel.pool.get_connection()
        pooled.register_connect_callback(method)
        channel.pool.release(pooled)


def receive(connection: Connection, timeout: float) -> None:
    """Wait at most `timeout` seconds for one message, and call its consumer."""
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=timeout)


def receive_all(connection: Connection, timeout: float) -> None:
    """Wait at most `timeout` seconds for a message, and call the consumers of all that have arrived by then."""
    receive(connection, timeout)
    if connection.transport.driver_type == "amqp":  # on Redis kombu has read all of them
        while connection.connection.transport.has_more:
            connection.connection.blocking_read()


def check_alive(connection: Connection, channel: Any) -> None:
    """Raise an error if the broker is silent. To be called about once a second by a thread that only reads messages of
    fanouts: a network that was cut brings no messages, and no errors either.
    """
    if not isinstance(channel, RedisChannel):
        connection.heartbeat_check()
    elif time.monotonic() - channel.subclient.connection.next_health_check > PONG_WITHIN * ANSWER_WITHIN:
        raise ConnectionResetError("the broker does not answer")
    else:
        channel.subclient.check_health()  # send PING if nothing was read for `health_check_interval` seconds


def close_idle(channel: Any) -> None:
    """Close the socket on which this channel sends commands to Redis: for one that only receives messages of fanouts,
    and seldom sends something. It is opened again for the next command."""
    if isinstance(channel, RedisChannel):
        channel.pool.disconnect()


def hang_up(connection: Connection) -> None:
    """Close a connection that failed, within a second or two: the broker may not answer any more."""
    bound_open_broker_sockets(connection, CLOSE_WITHIN)
    with contextlib.suppress(Exception):
        connection.collect()


class Publisher:
    """A connection to publish with, for one thread. It is opened at the first publish. After an error the caller has to
    `drop` it, and may try again.

    When `publish` returns, the broker has the message. A lost connection is always an error: it is never opened again
    without one, since messages that were published before may be lost too.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self.connection_errors: tuple[type[Exception], ...] = (OSError, OperationalError)
        self._declared: OrderedDict[str, list[Any]] = OrderedDict()

    def publish(
        self, body: bytes, *, routing_key: str, declare: Callable[[str], Any], exchange: str = "", **properties: Any
    ) -> None:
        """Publish JSON that the broker need not write to disk. `declare` returns the queue or exchange for a routing
        key; it is called once for each. On RabbitMQ a queue is left to its consumer to declare: if there is none any
        more, the message is dropped.
        """
        producer = self._producer = self._producer or self._open()
        producer.publish(
            body,
            exchange=exchange,
            routing_key=routing_key,
            content_type="application/json",
            content_encoding="utf-8",
            declare=self._undeclared(routing_key, declare, producer.channel),
            delivery_mode=1,
            retry=False,
            **properties,
        )

    @property
    def channel(self) -> Any:
        """The channel that it publishes on."""
        self._producer = self._producer or self._open()
        return self._producer.channel

    def drop(self) -> None:
        """Close the connection after an error. The next publish opens another."""
        if connection := self._forget():
            hang_up(connection)

    def close(self) -> None:
        if connection := self._forget():
            with contextlib.suppress(Exception):
                connection.close()

    def _forget(self) -> Connection | None:
        connection, self._connection, self._producer = self._connection, None, None
        self._declared.clear()
        return connection

    def _open(self) -> Producer:
        connection = self._connection = self._connect()
        self.connection_errors = (OSError, OperationalError, *connection.connection_errors)
        connection.shared_socket = None  # its loss has to be noticed here
        # Nothing here has a priority: on Redis a queue would be four lists to expire instead of one.
        connection.transport_options = {**connection.transport_options, "priority_steps": [0]}
        channel = open_channel(connection)
        call_when_opened_again(channel, self._opened_again)
        return Producer(channel, auto_declare=False)

    def _opened_again(self, connection: Any) -> None:
        """redis-py opens a lost connection again between two commands, without an error."""
        raise ConnectionResetError("the connection to the broker was lost")

    def _undeclared(self, routing_key: str, declare: Callable[[str], Any], channel: Any) -> list[Any]:
        if routing_key not in self._declared:
            entity = declare(routing_key)(channel)
            is_left_out = isinstance(entity, Queue) and not isinstance(channel, RedisChannel)
            self._declared[routing_key] = [] if is_left_out else [entity]
            if len(self._declared) > REMEMBERED:
                self._declared.popitem(last=False)
        return self._declared[routing_key]
