"""A connection to publish with, for one thread."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from kombu import Connection, Producer
from kombu.exceptions import OperationalError
from kombu.transport.redis import Channel as RedisChannel

from fleet_worker.broker.connection import hang_up, open_channel

REMEMBERED = 10_000
"""Routing keys whose queue or exchange is known to be declared."""


class Publisher:
    """Opens its connection at the first publish. After an error the caller has to `drop` it, and may try again.

    When `publish` returns, the broker has the message. A lost connection is always an error: it is never opened again
    without one, since messages that were published before may be lost too.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self.connection_errors: tuple[type[Exception], ...] = (OSError, OperationalError)
        self._declared: OrderedDict[str, Any] = OrderedDict()

    def publish(
        self, body: bytes, *, routing_key: str, declare: Callable[[str], Any], exchange: str = "", **properties: Any
    ) -> None:
        """Publish JSON that the broker need not write to disk. `declare` returns the queue or exchange that has to
        exist for a routing key; it is called once for each.
        """
        producer = self._producer = self._producer or self._open()
        producer.publish(
            body,
            exchange=exchange,
            routing_key=routing_key,
            content_type="application/json",
            content_encoding="utf-8",
            declare=[self._entity(routing_key, declare, producer.channel)],
            delivery_mode=1,
            retry=False,
            **properties,
        )

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
        if isinstance(channel, RedisChannel):
            pooled = channel.pool.get_connection()
            pooled.register_connect_callback(self._opened_again)
            channel.pool.release(pooled)
        return Producer(channel, auto_declare=False)

    def _opened_again(self, connection: Any) -> None:
        """redis-py opens a lost connection again between two commands, without an error."""
        raise ConnectionResetError("the connection to the broker was lost")

    def _entity(self, routing_key: str, declare: Callable[[str], Any], channel: Any) -> Any:
        if routing_key not in self._declared:
            self._declared[routing_key] = declare(routing_key)(channel)
            if len(self._declared) > REMEMBERED:
                self._declared.popitem(last=False)
        return self._declared[routing_key]
