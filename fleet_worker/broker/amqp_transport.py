"""kombu's RabbitMQ transport, subclassed for the connections of our own applications."""

from __future__ import annotations

from amqp.exceptions import Blocked
from kombu.transport import pyamqp


class Connection(pyamqp.Connection):  # type: ignore[misc]
    def _on_blocked(self) -> None:
        """Raise an error in whoever waits: RabbitMQ is short of memory or disk space, and reads nothing more that is
        sent on this connection. By itself each publish would wait for its timeout."""
        raise Blocked("the broker takes no messages")


class Transport(pyamqp.Transport):  # type: ignore[misc]
    Connection = Connection


class SSLTransport(pyamqp.SSLTransport):  # type: ignore[misc]
    Connection = Connection
