"""Connections to the broker that wait no longer than they are told."""

from __future__ import annotations

from amqp.exceptions import AMQPError, MessageNacked, RecoverableConnectionError
from kombu import Connection
from kombu.exceptions import KombuError, OperationalError
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

__all__ = ["BROKER_ERRORS", "connect", "is_away"]

BROKER_ERRORS = (OSError, KombuError, RedisError, AMQPError, MessageNacked)
"""What a broker that is away, or that refuses, is noticed by: errors of kombu, or of the libraries below it."""
_AWAY = (OSError, RedisConnectionError, RedisTimeoutError, RecoverableConnectionError)
_REFUSED = (AuthenticationError, AuthorizationError)


def connect(connection: Connection, seconds: float) -> Connection:
    """Open it, if it is not open, and let each of its waits end after so many seconds, from now on.

    For a connection that one thread uses at a time. Left alone, one to RabbitMQ waits for ever, and kombu may try for
    ever to open it.

    Raises:
        one of BROKER_ERRORS: there is no broker, it does not answer in time, or it refuses.
    """
    if not connection.connected:
        limits = {"socket_timeout": seconds, "socket_connect_timeout": seconds}
        connection.transport_options = {**connection.transport_options, **limits}
        connection.connect_timeout = seconds
        connection.ensure_connection(max_retries=0)
    if connection.transport.driver_type == "redis":
        pool = connection.default_channel.pool
        link = pool.get_connection()
        link.socket_timeout = seconds
        link.update_current_socket_timeout(seconds)
        pool.release(link)
    else:
        connection.connection.sock.settimeout(seconds)
    return connection


def is_away(error: BaseException) -> bool:
    """Tell whether the broker may take the same again as soon as it is back."""
    cause = error.__cause__ if isinstance(error, OperationalError) and error.__cause__ else error
    return isinstance(cause, _AWAY) and not isinstance(cause, _REFUSED)
