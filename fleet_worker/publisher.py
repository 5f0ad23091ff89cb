"""A connection to publish with, for one thread."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from kombu import Connection, Producer
from kombu.exceptions import OperationalError

__all__ = ["Publisher"]

REMEMBERED = 10_000
"""Routing keys whose queue or exchange is known to be declared."""


class Publisher:
    """Opened when needed, dropped when it fails: whoever publishes decides whether to try again."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self.connection_errors: tuple[type[Exception], ...] = (OSError, OperationalError)
        self._declared: OrderedDict[str, Any] = OrderedDict()

    def publish(
        self, body: bytes, *, routing_key: str, declare: Callable[[str], Any], exchange: str = "", **properties: Any
    ) -> None:
        """Publish JSON that no broker has to keep. `declare` makes the queue or exchange that has to be there for a
        routing key; it is asked once for each.
        """
        if self._producer is None:
            self._connection = self._connect()
            self.connection_errors = (OSError, OperationalError, *self._connection.connection_errors)
            # Nothing here has a priority: on Redis a queue would be four lists to expire instead of one.
            self._connection.transport_options = {**self._connection.transport_options, "priority_steps": [0]}
            self._producer = Producer(self._connection.channel(), auto_declare=False)
        self._producer.publish(
            body,
            exchange=exchange,
            routing_key=routing_key,
            content_type="application/json",
            content_encoding="utf-8",
            declare=[self._entity(routing_key, declare, self._producer.channel)],
            delivery_mode=1,
            retry=False,
            **properties,
        )

    def drop(self) -> None:
        """Close the connection, if it still can be closed."""
        connection, self._connection, self._producer = self._connection, None, None
        self._declared.clear()
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def _entity(self, routing_key: str, declare: Callable[[str], Any], channel: Any) -> Any:
        if routing_key not in self._declared:
            self._declared[routing_key] = declare(routing_key)(channel)
            if len(self._declared) > REMEMBERED:
                self._declared.popitem(last=False)
        return self._declared[routing_key]
