"""kombu's Redis transport, subclassed for the connections of our own applications.

Other kombu and Celery applications of the process are not touched. Private names of kombu that are overridden here are
held by tests/unit/broker/test_redis_transport.py.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import redis, virtual
from kombu.utils.json import dumps


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

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.QoS = QoS  # kombu chooses one in its own __init__
        self.async_pool.disconnect()  # kombu asked PING on it: a channel that only publishes would keep that connection

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return one client for each pool: a new one for every publish costs 0.1 of its 0.24 ms."""
        pool = self.async_pool if asynchronous else self.pool
        if not hasattr(pool, "fleet_client"):
            pool.fleet_client = super()._create_client(asynchronous)
        return pool.fleet_client

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
        """Read from this connection in the event loop, and forget the one that was read before.

        kombu leaves a callback of every former connection in the loop, which runs all of them in each turn and keeps
        their memory (0.1 MB each).
        """
        loop.on_tick -= getattr(loop, "fleet_callbacks", set())
        others = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        loop.fleet_callbacks = loop.on_tick - others
