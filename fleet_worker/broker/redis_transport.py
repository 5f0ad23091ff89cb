"""kombu's Redis transport, subclassed for the connections of our own applications.

Other kombu and Celery applications of the process are not touched (tests/unit/broker/test_isolation.py). The private
names of kombu that are used here are checked by tests/unit/broker/test_private_names.py.
"""

from __future__ import annotations

import threading
from typing import Any

from kombu.transport import redis, virtual
from kombu.utils.json import dumps
from redis import BlockingConnectionPool, ConnectionPool

SOCKET_FREE_WITHIN = 5.0
"""Seconds that a thread waits for the shared socket; another waits that long for an answer of a frozen broker."""


class SharedSocket:
    """The one socket on which all channels of a process send their short commands, from any thread.

    kombu opens one for each channel. Blocking reads (BRPOP, PUB/SUB) have sockets of their own in any case.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ConnectionPool | None = None

    def pool(self, like: ConnectionPool) -> ConnectionPool:
        """Return the pool of this one socket, made with the parameters of the first caller."""
        with self._lock:
            self._pool = self._pool or BlockingConnectionPool(  # type: ignore[no-untyped-call]
                1, SOCKET_FREE_WITHIN, connection_class=like.connection_class, **like.connection_kwargs
            )
            return self._pool


class QoS(virtual.QoS):  # type: ignore[misc]
    """The messages that a consumer holds. They are never put back into their queue by this process.

    When a connection drops, kombu puts them back, and the same worker takes them a second time while the first still
    runs (measured, kombu 5.7). Our tasks survive the drop.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # kombu would put them back when the interpreter exits, and until then it keeps every channel whose connection
        # broke before it was closed, with its sockets (three open files each time).
        self._on_collect.cancel()


class Channel(redis.Channel):  # type: ignore[misc]
    do_restore = False
    _shares_socket = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.QoS = QoS  # kombu chooses one in its own __init__
        self.async_pool.disconnect()  # kombu asked PING on it: a channel that only publishes would keep that connection

    def _get_pool(self, asynchronous: bool = False) -> Any:
        pool, shared = super()._get_pool(asynchronous), self.connection.client.shared_socket
        if asynchronous or not shared:
            return pool
        self._shares_socket = True
        return shared.pool(like=pool)

    def _disconnect_pools(self) -> None:
        if self._shares_socket:
            self._pool = None  # another channel may be waiting for an answer on it
        super()._disconnect_pools()

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return one client for each pool: a new one for every publish costs 0.1 of its 0.24 ms."""
        pool = self.async_pool if asynchronous else self.pool
        if not hasattr(pool, "fleet_client"):
            pool.fleet_client = super()._create_client(asynchronous)
        return pool.fleet_client

    def _handle_message(self, client: Any, response: Any) -> Any:
        """Drop what anybody publishes on the channel by which a router shows its presence. kombu uses patterns only,
        whose messages are called `pmessage`."""
        message = super()._handle_message(client, response)
        return {**message, "type": "dropped"} if message["type"] == b"message" else message

    def _restore_at_beginning(self, message: Any) -> None:
        """Give a message back to the front of its queue. kombu puts it behind all that has come since."""
        sent, info = message.serializable(), message.delivery_info
        sent["redelivered"] = True
        for queue in self._lookup(info["exchange"], info["routing_key"]):
            key = self._q_for_pri(queue, self._get_message_priority(sent, reverse=False))
            with self.conn_or_acquire() as client, client.pipeline() as pipe:
                pipe.rpush(key, dumps(sent))
                if queue in self._expires:
                    pipe.pexpire(key, self._expires[queue])
                pipe.execute()


class Transport(redis.Transport):  # type: ignore[misc]
    Channel = Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Read from this connection in the event loop, and no longer from the one before it.

        kombu leaves a callback of every former connection in the loop, which runs all of them in each turn and keeps
        their memory (0.1 MB each).
        """
        loop.on_tick -= getattr(loop, "fleet_callbacks", set())
        others = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        loop.fleet_callbacks = loop.on_tick - others
