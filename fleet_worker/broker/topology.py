"""Names of lanes, queues, exchanges and tasks, and how they are declared: pure functions, used by router and node."""

from __future__ import annotations

import hashlib
import re
import uuid
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from kombu import Exchange, Queue

from fleet_worker.protocol.request import Priority

Transport = Literal["redis", "amqp"]

EXCHANGE = Exchange("llm.fleet", type="topic", durable=True)
REPLY_PREFIX = "llm.fleet.reply."
PLAIN = "plain"
"""A part of the name of a reply queue whose router reads replies that are not wrapped. One of version 0.1 does not."""
LONGEST_EXPIRY = 999_999
"""Seconds after which a reply queue is deleted at the latest."""
CONTROL_EXCHANGE = "llm.fleet.control"
EVENT_EXCHANGE = "llm.fleet.events"
"""Of Celery's remote control and of its events: Celery's own names are those of every Celery application."""
LONGEST_SLUG = 200
"""Characters, so that the name of a lane is no longer than the 255 bytes of RabbitMQ."""
LANE_EXPIRES = 24 * 3600.0
"""Seconds until an unused lane is deleted: longer than any request lives. All nodes of a lane may be away that long."""


def transport_of(broker_url: str) -> Transport:
    return "amqp" if "amqp" in urlsplit(broker_url).scheme else "redis"


def task_name(operation: str) -> str:
    return f"fleet.{operation}"


def slug(name: str) -> str:
    """`mlx-community/Qwen3-14B_4bit` -> `mlx-community-qwen3-14b-4bit`. Two names may have the same slug."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def lane(operation: str, model: str) -> str:
    """Return the lane of one capability of one model; no two models share one.

    `qwen3-8b` -> `llm.fleet.chat.qwen3-8b`. A name that differs from its slug is told apart by a hash, after a
    character that no slug has: `qwen3:8b` -> `llm.fleet.chat.qwen3-8b_9a4b1bd5`.
    """
    readable = slug(model)
    if readable != model or len(readable) > LONGEST_SLUG:
        hashed = hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()
        readable = f"{readable[:LONGEST_SLUG].strip('-')}_{hashed[:8]}"
    return f"{EXCHANGE.name}.{operation}.{readable}"


def old_lane(operation: str, model: str) -> str:
    """Return the lane that version 0.1.0 used, which models with the same slug shared."""
    return f"{EXCHANGE.name}.{operation}.{slug(model)}"


def direct_lane(node: str) -> str:
    """Return the lane of requests that are meant for one node only."""
    return f"{EXCHANGE.name}.node.{node}"


def is_node_name(name: object) -> bool:
    """Tell whether this is INSTANCE@HOST, and short enough to be part of a lane's name."""
    return isinstance(name, str) and re.fullmatch(r"[\w-]+@[\w.-]+", name) is not None and len(name.encode()) <= 200


def lane_queue(name: str, transport: Transport) -> Queue:
    """Return the queue of a lane. Router and node must declare it alike: RabbitMQ refuses other arguments (406)."""
    if transport == "redis":
        return Queue(name, EXCHANGE, routing_key=name, expires=LANE_EXPIRES)
    return Queue(name, EXCHANGE, routing_key=name, durable=True, expires=LANE_EXPIRES, max_priority=9)


def route_to(name: str, transport: Transport) -> dict[str, Any]:
    """Return the options with which `send_task` publishes to a lane.

    On RabbitMQ through the topic exchange. On Redis through the default exchange ("direct" to Celery), where the
    routing key is the queue's name: kombu reads the whole binding table of a named exchange at every publish
    (measured: 1.0 ms with 300 lanes instead of 0.2 ms).
    """
    queue = lane_queue(name, transport)
    return {"queue": queue, "exchange_type": "direct" if transport == "redis" else queue.exchange.type}


def reply_name(host: str, expires: float) -> str:
    """Return a new name for the reply queue of one router. It ends with the seconds after which the queue expires."""
    return f"{REPLY_PREFIX}{slug(host)}.{uuid.uuid4().hex[:12]}.{PLAIN}.{min(max(1, round(expires)), LONGEST_EXPIRY)}"


def reply_queue(name: str) -> Queue:
    """Return the reply queue of one router. Its arguments follow from its name.

    On Redis nodes set the time to live of its list.

    On RabbitMQ its router declares it. It is durable, since RabbitMQ may refuse queues that are neither durable nor
    exclusive, and an exclusive one is deleted, with the replies in it, whenever its router reconnects. Only one
    consumer may read at a time: a router whose network was cut is connected twice for a while, and every other message
    would go to its dead connection.
    """
    one_reader = {"x-single-active-consumer": True}
    arguments = {"expires": expiry(name), "queue_arguments": one_reader}
    return Queue(name, Exchange(""), routing_key=name, durable=True, **arguments)


def is_plain(reply_to: str) -> bool:
    """Tell whether the router of this queue reads replies that are not wrapped."""
    return f".{PLAIN}." in reply_to


def expiry(reply_to: str) -> float:
    """Return the seconds after which this reply queue expires."""
    return float(reply_to.rpartition(".")[2])


def registry_exchange(transport: Transport) -> Exchange:
    """Return the exchange of registry events, whose routing keys are `llm.registry.<event_type>`.

    On Redis a fanout, which uses PUBLISH: with a topic, the list of a dead subscriber grows for ever (measured).
    """
    kind = "fanout" if transport == "redis" else "topic"
    return Exchange("llm.registry", type=kind, durable=True, delivery_mode="transient")


def registry_queue(transport: Transport) -> Queue:
    """Return a new subscription to all registry events."""
    return _subscription("llm.registry.view", registry_exchange(transport), "llm.registry.*", transport)


def ask_exchange() -> Exchange:
    """Return the exchange on which a router asks all registry nodes for the status of their hosts, or for digests."""
    return Exchange("llm.registry.ask", type="fanout", durable=True, delivery_mode="transient")


def ask_queue(transport: Transport) -> Queue:
    """Return a new subscription of one registry node."""
    return _subscription("llm.registry.ask", ask_exchange(), "", transport)


def digest_exchange() -> Exchange:
    """Return the exchange on which registry nodes publish the digests of prompt caches."""
    return Exchange("llm.registry.digest", type="fanout", durable=True, delivery_mode="transient")


def digest_queue(transport: Transport) -> Queue:
    """Return a new subscription of one router."""
    return _subscription("llm.registry.digest", digest_exchange(), "", transport)


def cancel_exchange() -> Exchange:
    """Return the exchange on which a router sends its notices to all nodes."""
    return Exchange("llm.fleet.cancel", type="fanout", durable=True, delivery_mode="transient")


def cancel_queue(transport: Transport) -> Queue:
    """Return a new subscription of one node."""
    return _subscription("llm.fleet.cancel", cancel_exchange(), "", transport)


def listening_key(reply_to: str) -> str:
    """Return the name of the key, and of the channel, by which a router shows on Redis that it consumes this reply
    queue (`broker.presence`)."""
    return f"{reply_to}.listening"


def wake_key() -> str:
    """Return a new name for the list by which a reader on Redis ends its own wait for messages."""
    return f"{EXCHANGE.name}.wake.{uuid.uuid4().hex[:12]}"


def quota_keys(name: str) -> tuple[str, str]:
    """Return the names of the keys on Redis that count what a key of the gateway has used: a hash, and a sorted set of
    its requests that run."""
    return f"llm.quota.{name}", f"llm.quota.{name}.running"


def _subscription(name: str, exchange: Exchange, key: str, transport: Transport) -> Queue:
    """Return a queue that is deleted when its subscriber dies. On Redis all subscribers use one name, since each name
    stays in a set for ever, and each still gets every message. On RabbitMQ each has a queue of its own."""
    if transport == "redis":
        return Queue(name, exchange, routing_key=key, durable=False)
    own = f"{name}.{uuid.uuid4().hex[:12]}"
    return Queue(own, exchange, routing_key=key, durable=False, exclusive=True, auto_delete=True, max_length=10_000)


def priority(level: Priority, transport: Transport) -> int:
    """Return Celery's number for a level. The first to be served is 0 on Redis, 9 on RabbitMQ."""
    rank = get_args(Priority).index(level) * 3
    return rank if transport == "redis" else 9 - rank
