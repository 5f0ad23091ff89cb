"""Does at the broker what a node and a router do there, on names of its own: so a right that is missing is found before
a request needs it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kombu import Consumer, Exchange, Producer, Queue
from kombu.transport.redis import Channel as RedisChannel

from fleet_worker.broker import presence
from fleet_worker.broker.topology import (
    EXCHANGE,
    Transport,
    ask_exchange,
    ask_queue,
    cancel_exchange,
    cancel_queue,
    digest_exchange,
    digest_queue,
    lane_queue,
    registry_exchange,
    registry_queue,
    reply_name,
    reply_queue,
)
from fleet_worker.protocol.request import ControlMessage

Step = tuple[str, Callable[[], object]]
"""What is done, as in "take a request", and a function that does it and raises one of BROKER_ERRORS."""
SUBSCRIBED_WITHIN = 2.0
"""Seconds that Redis has to confirm a subscription."""
DEFAULT_EXCHANGE = Exchange("")


def confirm_lane(channel: Any, queue: Queue) -> None:
    """Raise the error that a consumer of this lane would get. Nothing is taken out of it.

    On Redis, which reads several lanes at once, all of them would fail with one. RabbitMQ answers each consumer itself.
    """
    if isinstance(channel, RedisChannel):
        with channel.conn_or_acquire() as client:
            for step in channel.priority_steps:
                client.execute_command("RPOP", channel._q_for_pri(queue.name, step), 0)


def rehearse(channel: Any, transport: Transport) -> Iterator[Step]:
    """Yield what a router and a node do. To be called in this order, all of them, also after an error: the last ones
    delete what was made."""
    on = _on(channel, transport)
    lane = lane_queue(new_lane(), transport)(channel)
    reply = reply_queue(reply_name("check", 5))(channel)
    yield "declare a lane", lane.declare
    yield "declare a reply queue", reply.declare
    yield "send a request", partial(on.publish, lane.name, DEFAULT_EXCHANGE if transport == "redis" else EXCHANGE)
    yield "see how many requests wait", partial(lane.queue_declare, passive=True)
    yield "take a request", partial(on.consume, lane)
    yield from _replies(on, channel, transport, reply.name)
    yield "show that a router listens", partial(presence.stay, channel, reply.name)
    yield "receive registry events", partial(on.subscribe, registry_queue(transport))
    yield "receive questions of routers", partial(on.subscribe, ask_queue(transport))
    yield "ask for the status of hosts", partial(on.announce, ask_exchange(), b"{}")
    yield "receive digests of prompt caches", partial(on.subscribe, digest_queue(transport))
    yield "publish digests of prompt caches", partial(on.announce, digest_exchange(), b"{}")
    yield "cancel a request", partial(on.announce, cancel_exchange(), ControlMessage().encode())
    yield "forget a router that has ended", partial(presence.leave, channel, reply.name)
    yield "delete a reply queue", reply.delete
    yield "delete a lane", lane.delete


def new_lane() -> str:
    """Return a name that no other lane has."""
    return f"{EXCHANGE.name}.check.{uuid.uuid4().hex[:12]}"


def rehearse_replies(channel: Any, transport: Transport) -> None:
    """Do what a node needs besides its lanes. Raises one of BROKER_ERRORS if that is refused."""
    for _, act in _replies(_on(channel, transport), channel, transport, reply_name("check", 5)):
        act()


def _on(channel: Any, transport: Transport) -> _OnRedis | _OnRabbitMQ:
    return _OnRedis(channel) if transport == "redis" else _OnRabbitMQ(channel)


def _replies(on: _OnRedis | _OnRabbitMQ, channel: Any, transport: Transport, name: str) -> Iterator[Step]:
    yield "read lanes", on.rehearse_lane
    yield "reply", partial(on.reply, name)
    yield "see whether a router listens", partial(presence.look_for, channel, transport, [name])
    yield "receive cancels", partial(on.subscribe, cancel_queue(transport))
    yield "publish registry events", partial(on.announce, registry_exchange(transport), b"{}")


def _publish(channel: Any, routing_key: str, exchange: Exchange, body: bytes = b"{}", **options: Any) -> None:
    json = {"content_type": "application/json", "content_encoding": "utf-8"}
    producer = Producer(channel, auto_declare=False)
    producer.publish(body, exchange=exchange, routing_key=routing_key, retry=False, **json, **options)


class _OnRedis:
    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def publish(self, routing_key: str, exchange: Exchange) -> None:
        _publish(self._channel, routing_key, exchange)

    def reply(self, name: str) -> None:
        """Into a list that expires."""
        _publish(self._channel, name, DEFAULT_EXCHANGE, declare=[reply_queue(name)(self._channel)])

    def consume(self, queue: Queue) -> None:
        """Read as kombu does. This takes a message, so it is never done to a lane in use."""
        confirm_lane(self._channel, queue)
        with self._channel.conn_or_acquire() as client:
            client.execute_command("BRPOP", queue.name, 0.001)

    def rehearse_lane(self) -> None:
        lane = lane_queue(new_lane(), "redis")(self._channel)
        try:
            lane.declare()
            self.consume(lane)
        finally:
            lane.delete()

    def subscribe(self, queue: Queue) -> None:
        """To the real one, on a socket of its own: Redis allows a pattern only if the very same one is granted."""
        with self._channel.connection.client.channel() as channel:
            Consumer(channel, [queue], no_ack=True).consume()
            pubsub = channel.subclient
            pubsub.psubscribe(*channel._get_subscribe_topics(queue.name))
            if pubsub.connection.can_read(SUBSCRIBED_WITHIN):
                pubsub.parse_response()

    def announce(self, exchange: Exchange, body: bytes) -> None:
        """On a channel that nobody listens to."""
        with self._channel.conn_or_acquire() as client:
            client.publish(f"{self._channel.keyprefix_fanout}{exchange.name}.check", body)


class _OnRabbitMQ:
    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def publish(self, routing_key: str, exchange: Exchange, body: bytes = b"{}") -> None:
        """RabbitMQ tells only later that it refuses a message, so ask it something afterwards."""
        _publish(self._channel, routing_key, exchange, body, delivery_mode=1)
        self._channel.basic_qos(0, 1, False)

    def rehearse_lane(self) -> None:
        """Not needed: RabbitMQ answers for each lane."""

    def reply(self, name: str) -> None:
        self.publish(name, DEFAULT_EXCHANGE)

    def consume(self, queue: Queue) -> None:
        queue.consume("check", lambda message: None, no_ack=True)
        queue.cancel("check")

    def subscribe(self, queue: Queue) -> None:
        bound = queue(self._channel)
        bound.declare()
        self.consume(bound)  # it is deleted with its consumer

    def announce(self, exchange: Exchange, body: bytes) -> None:
        """To nodes this says nothing; a topic without a word of ours goes to nobody."""
        exchange(self._channel).declare()
        self.publish("check", exchange, body)
