"""Names of lanes, queues, exchanges and tasks, and how they are declared: pure functions, the same on both sides."""

from __future__ import annotations

import re
import uuid
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from kombu import Exchange, Queue

from fleet_worker.protocol.request import Priority

Transport = Literal["redis", "amqp"]

EXCHANGE = Exchange("llm.fleet", type="topic", durable=True)
REPLY_PREFIX = "llm.fleet.reply."
LANE_EXPIRES = 24 * 3600.0
"""Seconds an unused lane stays declared: longer than any request lives, so a mini may be away that long."""


def transport_of(broker_url: str) -> Transport:
    return "amqp" if "amqp" in urlsplit(broker_url).scheme else "redis"


def task_name(operation: str) -> str:
    return f"fleet.{operation}"


def slug(model: str) -> str:
    """`mlx-community/Qwen3-14B_4bit` -> `mlx-community-qwen3-14b-4bit`. Two models may share one: the id decides."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


def lane(operation: str, model: str) -> str:
    """The lane of one capability of one model: it describes the work, not the worker."""
    return f"{EXCHANGE.name}.{operation}.{slug(model)}"


def direct_lane(node: str) -> str:
    """The lane of work that is meant for one node only."""
    return f"{EXCHANGE.name}.node.{node}"


def is_node_name(name: object) -> bool:
    """Can a node be named so: INSTANCE@HOST, short enough for the name of its lane?"""
    return isinstance(name, str) and re.fullmatch(r"[\w-]+@[\w.-]+", name) is not None and len(name.encode()) <= 200


def lane_queue(name: str, transport: Transport) -> Queue:
    """The queue of a lane, which router and node declare alike.

    RabbitMQ refuses a second declaration with other arguments (406), so this is the only place that makes one.
    """
    if transport == "redis":
        return Queue(name, EXCHANGE, routing_key=name, expires=LANE_EXPIRES)
    return Queue(name, EXCHANGE, routing_key=name, durable=True, expires=LANE_EXPIRES, max_priority=9)


def route_to(name: str, transport: Transport) -> dict[str, Any]:
    """The options of `send_task` that bring a task into a lane.

    On RabbitMQ through the topic exchange. On Redis through the default exchange ("direct" to Celery), where the
    routing key is the queue's name: kombu reads the whole binding table of a named exchange at every publish
    (measured: 1.0 ms with 300 lanes instead of 0.2 ms).
    """
    queue = lane_queue(name, transport)
    return {"queue": queue, "exchange_type": "direct" if transport == "redis" else queue.exchange.type}


def reply_name(host: str, expires: float) -> str:
    """A new name for the reply queue of one router. It ends with the seconds after which the queue expires."""
    return f"{REPLY_PREFIX}{slug(host)}.{uuid.uuid4().hex[:12]}.{max(1, round(expires))}"


def reply_queue(name: str) -> Queue:
    """The reply queue of one router.

    Node and router declare it alike, from nothing but its name: RabbitMQ refuses two opinions about an expiry, and on
    Redis only a publisher that has declared the queue sets the time to live of its list.

    RabbitMQ lets one consumer read at a time: to it, a router whose network was cut is there twice for a while, and
    every other message would go to the connection that is dead.
    """
    one_reader = {"x-single-active-consumer": True}
    expires = float(name.rpartition(".")[2])
    return Queue(name, Exchange(""), routing_key=name, durable=False, expires=expires, queue_arguments=one_reader)


def registry_exchange(transport: Transport) -> Exchange:
    """Where registry events are published, with the routing key `llm.registry.<event_type>`.

    On Redis a fanout, so PUBLISH: the list of a topic's dead subscriber grows without end (measured).
    """
    kind = "fanout" if transport == "redis" else "topic"
    return Exchange("llm.registry", type=kind, durable=True, delivery_mode="transient")


def registry_queue(transport: Transport) -> Queue:
    """A new subscription to all registry events, which leaves nothing behind when its subscriber dies."""
    return _subscription("llm.registry.view", registry_exchange(transport), "llm.registry.*", transport)


def ask_exchange() -> Exchange:
    """Where a router asks all registry nodes to say what there is."""
    return Exchange("llm.registry.ask", type="fanout", durable=True, delivery_mode="transient")


def ask_queue(transport: Transport) -> Queue:
    return _subscription("llm.registry.ask", ask_exchange(), "", transport)


def cancel_exchange() -> Exchange:
    """Where a router tells all nodes what nobody waits for any more."""
    return Exchange("llm.fleet.cancel", type="fanout", durable=True, delivery_mode="transient")


def cancel_queue(transport: Transport) -> Queue:
    """A new subscription of one node."""
    return _subscription("llm.fleet.cancel", cancel_exchange(), "", transport)


def listening_key(reply_to: str) -> str:
    """The key on Redis that is there as long as a router listens to this reply queue. (RabbitMQ counts consumers.)"""
    return f"{reply_to}.listening"


def _subscription(name: str, exchange: Exchange, key: str, transport: Transport) -> Queue:
    """On Redis every subscriber gets everything, whatever its queue is called, but each name stays in a set for ever;
    so they all have one. On RabbitMQ a queue is one subscriber's own."""
    if transport == "redis":
        return Queue(name, exchange, routing_key=key, durable=False)
    own = f"{name}.{uuid.uuid4().hex[:12]}"
    return Queue(own, exchange, routing_key=key, durable=False, exclusive=True, auto_delete=True, max_length=10_000)


def priority(level: Priority, transport: Transport) -> int:
    """Celery's number for a level. The brokers count in opposite directions: first is 0 on Redis, 9 on RabbitMQ."""
    rank = get_args(Priority).index(level) * 3
    return rank if transport == "redis" else 9 - rank
