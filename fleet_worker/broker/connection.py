"""Connections to a broker that may be away, frozen, or behind a network that was cut."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from typing import Any

from amqp.exceptions import AccessRefused, AMQPError, MessageNacked, NotAllowed, RecoverableConnectionError
from celery.utils.threads import bound_open_broker_sockets
from kombu import Connection
from kombu.exceptions import KombuError, OperationalError
from kombu.transport.redis import Channel as RedisChannel
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fleet_worker.errors import BrokerUnavailable

ANSWER_WITHIN = 5.0
"""Seconds after which a broker that does not answer counts as lost."""
HEARTBEAT = 5.0
"""Seconds; RabbitMQ, and whoever consumes from it, count each other as lost after twice as long without a word."""
BACK_OFF = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Seconds before each further try to reach a broker that is away; the last one from then on."""
FAREWELL = 0.5
"""Seconds for each answer that is waited for when a connection is closed that failed."""

BROKER_ERRORS = (OSError, KombuError, RedisError, AMQPError, MessageNacked)
"""What a broker that is away, or that refuses, is noticed by: errors of kombu, or of the libraries below it."""
_AWAY = (OSError, RedisConnectionError, RedisTimeoutError, RecoverableConnectionError)
_REFUSED = (AuthenticationError, AuthorizationError, NoPermissionError, AccessRefused, NotAllowed)
_CAUSES: tuple[tuple[type[BaseException], str, str], ...] = (
    (AuthenticationError, "refuses the user or the password", "correct them in broker_url"),
    (AccessRefused, "refuses the user or the password", "correct them in broker_url"),
    (
        NotAllowed,
        "does not let this user into this virtual host",
        "correct the end of broker_url, or the user's rights",
    ),
    (
        OutOfMemoryError,
        "has no room for more: its maxmemory is reached",
        "raise it, or see by fleet-worker status what waits",
    ),
    (ReadOnlyError, "takes nothing: it is the replica of another", "name that other one in broker_url"),
    (ResponseError, "refuses what a node asks of it", "give the user its rights, and check the end of broker_url"),
    (ConnectionRefusedError, "does not run: nothing listens there", "start it, or correct broker_url"),
    (socket.gaierror, "is on a host that cannot be found", "correct broker_url, or the DNS of this host"),
    (ssl.SSLError, "and this host do not agree on TLS", "check its certificate, and the scheme of broker_url"),
    (
        TimeoutError,
        "does not answer in time",
        "see whether it is frozen, a firewall is between, or broker_url has the wrong scheme (with TLS: rediss, amqps)",
    ),
)
"""What may be wrong with the connection, and what to do; the first that fits decides."""


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
    return isinstance(_cause(error), _AWAY) and not refuses(error)


def refuses(error: BaseException) -> bool:
    """Tell whether the broker will not have this user: it takes nothing before somebody corrects that."""
    return isinstance(_cause(error), _REFUSED)


def place_of(broker_url: str) -> str:
    """Where the broker is, for texts: without scheme, user, password and all that follows the port."""
    return re.split("[/?#]", broker_url.partition("://")[2].rpartition("@")[2])[0]


def unavailable(
    broker_url: str, said: str, cause: BaseException | str, *, retryable: bool | None = None
) -> BrokerUnavailable:
    """The error that says it of this broker, with the kind of its cause. If time does not mend that, it says what is
    wrong instead, and `metadata["advice"]` what to do. The texts of all other errors are left out."""
    place = place_of(broker_url)
    kind = cause if isinstance(cause, str) else type(cause.__cause__ or cause).__name__
    if retryable or isinstance(cause, str):
        return BrokerUnavailable(f"the broker at {place} {said} ({kind})", retryable=retryable)
    found, advice = _found(cause) or (f"{said} ({kind})", "look at its log, and check broker_url")
    return BrokerUnavailable(f"the broker at {place} {found}", retryable=retryable, advice=advice)


def _found(error: BaseException) -> tuple[str, str] | None:
    """What is wrong, and what to do. kombu and redis put their errors above what has happened."""
    chain: list[BaseException] = []
    under: BaseException | None = error
    while under is not None:
        chain.append(under)
        under = under.__cause__ or under.__context__
    said = ((found, advice) for kind, found, advice in _CAUSES if any(isinstance(each, kind) for each in chain))
    return next(said, None)


def _cause(error: BaseException) -> BaseException:
    """kombu's own error is above that of the library below it."""
    return error.__cause__ if isinstance(error, OperationalError) and error.__cause__ else error


def open_channel(connection: Connection) -> Any:
    """Return a channel on which nothing waits longer than `ANSWER_WITHIN` for the broker.

    The timeouts in Celery's transport options do as much, but py-amqp forgets its own in the middle of a message.
    """
    # By itself kombu would wait two seconds and try again.
    connection.ensure_connection(max_retries=0, reraise_as_library_errors=False)
    channel = connection.channel()
    bound_open_broker_sockets(connection, ANSWER_WITHIN)
    return channel


def hear(connection: Connection, timeout: float) -> None:
    """Let the consumers of this connection have what arrives first, or nothing after `timeout` seconds."""
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=timeout)


def prove(connection: Connection, channel: Any) -> None:
    """For who only listens, about once a second: raises an error if the broker fell silent. A line that was cut brings
    no messages, and no errors either.
    """
    if isinstance(channel, RedisChannel):
        with channel.conn_or_acquire() as client:
            client.ping()
    else:
        connection.heartbeat_check()


def hang_up(connection: Connection) -> None:
    """Close a connection that failed, within a second or two: there may be nobody to say farewell to."""
    bound_open_broker_sockets(connection, FAREWELL)
    with contextlib.suppress(Exception):
        connection.collect()
