"""kombu's Redis transport, subclassed for the connections of our own applications.

Other kombu and Celery applications of the process are not touched (tests/unit/broker/test_isolation.py). The private
names of kombu that are used here are checked by tests/unit/broker/test_private_names.py.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from functools import cached_property
from itertools import count
from queue import Empty
from typing import Any, Protocol

from kombu.transport import redis, virtual
from kombu.utils.json import dumps
from redis import BlockingConnectionPool, ConnectionPool
from redis.client import PubSub
from redis.exceptions import ResponseError

from fleet_worker.broker import tls
from fleet_worker.broker.bounded_socket import Bounded, BoundedConnection, packed
from fleet_worker.broker.door import MOST_FANOUT_BYTES, Door, OpenedMessage, Refused, wrapped_bytes
from fleet_worker.broker.topology import wake_key

SOCKET_FREE_WITHIN = 5.0
"""Seconds that a thread waits for the shared socket; another waits that long for an answer of a frozen broker."""
WAKE_EXPIRES = 10.0
"""Seconds after which the element that should end a read is deleted, if that read has ended by itself."""
_OUR_CONTENT: dict[str, Any] = {"content-type": "application/json", "content-encoding": "utf-8"}


class ReplyReader(Protocol):
    """Reads several elements of one list at once, from the connection that it is given."""

    def ask(self, connection: Any, timeout: float) -> None:
        """Send the command, with which the broker waits up to `timeout` seconds for the first element."""

    def read(self, connection: Any) -> None:
        """Read the whole answer, and use it."""


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
        self.is_full = False
        """The event loop has found all slots taken, and reads no lane until it is woken."""

    def can_consume(self) -> bool:
        """Return whether a slot is free. A task that ends meanwhile in its own thread is either seen here, or sees
        `is_full`."""
        self.is_full = not super().can_consume()
        if self.is_full:
            self.is_full = not super().can_consume()
        return not self.is_full


class _SSLConnection(Bounded, tls.RedisConnection):
    pass


class _Subscription(PubSub):
    def check_health(self) -> None:
        """Ask only if the last question is answered. By itself redis-py asks once more when it reads the answer."""
        if not self.health_check_response_counter:
            super().check_health()


class Message(OpenedMessage, virtual.Message):  # type: ignore[misc]
    pass


class Channel(redis.Channel):  # type: ignore[misc]
    do_restore = False
    Message = Message
    connection_class = BoundedConnection
    connection_class_ssl = _SSLConnection
    reply_reader: ReplyReader | None = None
    """Reads a reply queue, the only queue that is consumed on this channel then (`broker.replies`)."""
    _shares_socket = False
    _tags = count(1)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.QoS = QoS  # kombu chooses one in its own __init__
        self.async_pool.disconnect()  # kombu asked PING on it: a channel that only publishes would keep that connection
        self._wake_key = wake_key()
        self._is_woken = False
        """The read that is under way was ended with an element of the list `_wake_key`."""

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

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        most_bytes = wrapped_bytes(self.connection.client.door.most_bytes)
        return {**super()._connparams(asynchronous), "most_bytes": most_bytes}

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return one client for each pool: a new one for every publish costs 0.1 of its 0.24 ms."""
        pool = self.async_pool if asynchronous else self.pool
        if not hasattr(pool, "fleet_client"):
            pool.fleet_client = super()._create_client(asynchronous)
        return pool.fleet_client

    @cached_property
    def subclient(self) -> _Subscription:
        return _Subscription(self.async_pool)

    def maybe_refresh_binding_expiry(self) -> None:
        """Do it later if it is refused. kombu logs a traceback every second then; what is refused is known from
        others."""
        with contextlib.suppress(ResponseError):
            super().maybe_refresh_binding_expiry()

    # Messages come in

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for one element of the lists of all queues, or of the one that ends this read; or for replies."""
        timeout, connection = timeout or self.brpop_timeout, self.client.connection
        self._in_poll, self._brpop_sent_at, self._is_woken = connection, time.monotonic(), False
        if self.reply_reader:
            self.reply_reader.ask(connection, timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        keys = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        connection.send_packed_command(packed("BRPOP", self._wake_key, *keys, timeout))

    def _update_queue_cycle(self) -> None:
        """The queues that are consumed have changed: a read that waits for the former ones has to end."""
        super()._update_queue_cycle()
        self._end_read()

    def _end_read(self) -> bool:
        """End a read of queues that waits at the broker, by an element in a list that it reads, too. Return False if
        the broker does not answer.

        What the read may have popped meanwhile is used all the same; the element then ends the next read. CLIENT
        UNBLOCK would come too early for a BRPOP that is still on its way, and a user may not be allowed it.
        """
        if not self._in_poll or self.reply_reader or self._is_woken:
            return True
        try:
            with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
                pipe.lpush(self._wake_key, b"").pexpire(self._wake_key, round(1000 * WAKE_EXPIRES)).execute()
        except ResponseError:  # perhaps its memory is full: the read ends by itself after `brpop_timeout`
            return True
        except self.connection_errors:
            return False
        self._is_woken = True
        return True

    def close(self) -> None:
        """End a read that is under way first. kombu waits for its answer: it may have popped a message."""
        if not self._end_read():
            self._in_poll.disconnect()
            self._in_poll = None
        super().close()

    def _brpop_read(self, **options: Any) -> bool:
        """Receive an item of a list, as the reply to BRPOP; or several replies."""
        if self.reply_reader:
            return self._read_replies(self.reply_reader)
        try:
            reply = self.client.parse_response(self.client.connection, "BRPOP", **options)
        except self.connection_errors:
            self.client.connection.disconnect()  # or the next BRPOP would be sent on it
            raise
        finally:
            self._in_poll = None
        if not reply or reply[0].decode() == self._wake_key:
            raise Empty
        key, opened = reply[0].decode(), self._open(reply[1], self.connection.client.door.most_bytes)
        del reply  # perhaps of megabytes, while the consumer works
        queue, _, priority = key.partition(self.sep)
        self._queue_cycle.rotate(queue)
        self._hand_over(opened, queue, int(priority or 0))
        return True

    def _read_replies(self, reader: ReplyReader) -> bool:
        try:
            if self._closing:  # kombu would wait for the answer that is under way
                self.client.connection.disconnect()
            else:
                reader.read(self.client.connection)
        except BaseException:
            self.client.connection.disconnect()  # half of an answer may be left
            raise
        finally:
            self._in_poll = None
        return True  # also if there was none: kombu would sleep for `polling_interval` then

    def _receive_one(self, client: Any) -> bool | None:
        """Receive a message of a fanout."""
        try:
            reply = client.parse_response()
        except self.connection_errors:
            self._in_listen = None
            raise
        if not isinstance(reply, list | tuple):
            return None
        event = self._handle_message(client, reply)
        if event["type"] != b"pmessage":  # or somebody publishes on the channel by which a router shows its presence
            return None
        exchange = event["channel"].decode("utf-8", "replace").partition(".")[2].partition("/")[0]
        if queue := self._fanout_to_queue.get(exchange):
            self._hand_over(self._open(event["data"], MOST_FANOUT_BYTES), queue)
        return True

    def _open(self, item: bytes, most_bytes: int) -> tuple[bytes, dict[str, Any]] | None:
        """Return body and headers of a message, or None if it was dropped."""
        door: Door = self.connection.client.door
        try:
            return door.unwrap(item, most_bytes)
        except Refused as refused:
            door.drop(refused)
            return None

    def _hand_over(self, opened: tuple[bytes, dict[str, Any]] | None, queue: str, priority: int = 0) -> None:
        """Give a message to the consumer of its queue, with properties that follow from how it came here.

        Those of its sender could give it to another queue, or let it be taken for another one.
        """
        if opened is None:
            return
        tag, came_by = next(self._tags), {"exchange": "", "routing_key": queue}
        message = {"body": opened[0], "headers": opened[1], **_OUR_CONTENT}
        message["properties"] = {"delivery_tag": tag, "priority": priority, "delivery_info": came_by}
        try:
            self.connection._deliver(message, queue)
        except Refused as refused:
            self.qos.ack(tag)
            self.connection.client.door.drop(refused)

    # Messages go out

    def _put(self, queue: str, message: dict[str, Any], **options: Any) -> None:
        """Add a message to its list, whose expiry begins anew. kombu also sends MULTI, EXEC and the expiry of the lists
        of all other priorities, and reads seven answers: twice the time."""
        key = self._q_for_pri(queue, self._get_message_priority(message))
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            pipe.lpush(key, dumps(message))
            if queue in self._expires:
                pipe.pexpire(key, self._expires[queue])
            pipe.execute()

    def _restore_at_beginning(self, message: Any) -> None:
        """Give a message back to the front of its queue. kombu puts it behind all that has come since."""
        queue, priority = message.delivery_info["routing_key"], message.properties["priority"]
        properties = {**message.properties, "body_encoding": "base64"}
        sent = {"body": base64.b64encode(message.body).decode(), "headers": message.headers, **_OUR_CONTENT}
        sent |= {"properties": properties, "redelivered": True}
        key = self._q_for_pri(queue, priority)
        with self.conn_or_acquire() as client, client.pipeline() as pipe:
            pipe.rpush(key, json.dumps(sent))
            if queue in self._expires:
                pipe.pexpire(key, self._expires[queue])
            pipe.execute()


class Transport(redis.Transport):  # type: ignore[misc]
    Channel = Channel
    brpop_timeout = 4.0
    """Seconds after which a read that has brought nothing is repeated; less than the broker has for an answer
    (`ANSWER_WITHIN`). With 0.25 s, 2,000 idle readers cost Valkey about 20 % of a core.

    It is not kombu's transport option `polling_interval`: with that, whoever reads without an event loop also sleeps so
    long after each read that brought nothing, and a reply that comes meanwhile waits.
    """

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Read from this connection in the event loop, and no longer from the one before it.

        kombu leaves a callback of every former connection in the loop, which runs all of them in each turn and keeps
        their memory (0.1 MB each).
        """
        loop.on_tick -= getattr(loop, "fleet_callbacks", set())
        others = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        loop.fleet_callbacks = loop.on_tick - others
