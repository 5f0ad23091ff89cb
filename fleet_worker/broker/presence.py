"""Whether a router still listens: how it shows that, and how nodes ask.

On RabbitMQ a reply queue has a consumer as long as its router is connected. On Redis the router shows two things: it
subscribes to a channel, which ends with its socket and so tells at once that its process died; and it keeps a key
alive, which tells that it lost power or is frozen, since its socket then stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from amqp.exceptions import NotFound
from kombu.transport.redis import Channel as RedisChannel
from redis.exceptions import ResponseError

from fleet_worker.broker.faults import refusal
from fleet_worker.broker.topology import Transport, listening_key

Sight = Literal["here", "silent", "away"]
"""What the broker knows of a router. `silent`: it is connected, and does nothing, as a frozen process. `away`: it is
not connected; it died, or reconnects."""

PRESENCE = 6
"""Seconds after which the key of a router expires."""
SUBSCRIBES = b"2"
"""The value of the key if the router also subscribes. Routers of version 0.1.0 do not."""


def appear(channel: Any, reply_to: str) -> None:
    """Show that a router listens on this connection, on which it has subscribed to something already."""
    if isinstance(channel, RedisChannel):
        channel.subclient.subscribe(listening_key(reply_to))
    stay(channel, reply_to)


def stay(channel: Any, reply_to: str) -> None:
    """Show that a router still listens: at least every other second. Raises an error if the broker does not answer, or
    if the reply queue is gone; not if it takes nothing for now, since a router that reconnected would count as dead."""
    if isinstance(channel, RedisChannel):
        with channel.conn_or_acquire() as client:
            try:
                client.set(listening_key(reply_to), SUBSCRIBES, ex=PRESENCE)
            except ResponseError as error:
                if not ((refused := refusal(error)) and refused.passes):
                    raise
    else:
        channel.queue_declare(reply_to, passive=True)


def leave(channel: Any, reply_to: str) -> None:
    if isinstance(channel, RedisChannel):
        with channel.conn_or_acquire() as client:
            client.delete(listening_key(reply_to))


def look_for(channel: Any, transport: Transport, reply_queues: Iterable[str]) -> dict[str, Sight]:
    """Return what the broker knows of the routers with these reply queues. Redis is asked once for all of them.

    Raises:
        one of BROKER_ERRORS
    """
    names = list(reply_queues)
    if transport == "amqp":
        return {name: _count_consumers(channel, name) for name in names}
    keys = [listening_key(name) for name in names]
    with channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
        pipe.pubsub_numsub(*keys)
        pipe.mget(keys)
        subscribers, values = pipe.execute()
    return {name: _judge(count, value) for name, (_, count), value in zip(names, subscribers, values, strict=True)}


def _judge(subscribers: int, value: bytes | None) -> Sight:
    if subscribers:
        return "silent" if value is None else "here"
    return "away" if value in (None, SUBSCRIBES) else "here"


def _count_consumers(channel: Any, reply_to: str) -> Sight:
    try:
        return "here" if channel.queue_declare(reply_to, passive=True).consumer_count else "away"
    except NotFound:  # RabbitMQ closes the channel, which opens again by itself
        return "away"
