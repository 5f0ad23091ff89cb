"""Where the messages of a fuzz test go: straight into a broker, as a stranger with its password would send them."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Protocol

import amqp
import redis
from celery import Celery
from kombu.utils.url import url_to_parts

from fleet_worker.broker.connection import connect
from fleet_worker.broker.queue_depth import depths
from fleet_worker.broker.topology import direct_lane, lane, transport_of
from tests.faults.fuzz_messages import DEEP, DEEP_MARK, LARGE, Message
from tests.faults.fuzz_samples import MODELS

NODE, REGISTRY_NODE = "one@test", "registry@test"
FANOUTS = {
    "control": "llm.fleet.control.pidbox",
    "cancel": "llm.fleet.cancel",
    "ask": "llm.registry.ask",
    "want_digests": "llm.registry.ask",
    "digest": "llm.registry.digest",
    "registry": "llm.registry",
}
LANES = [
    *(lane(operation, model) for operation, model in MODELS.items()),
    direct_lane(NODE),
    direct_lane(REGISTRY_NODE),
]
PROPERTIES = ("correlation_id", "reply_to", "priority", "expiration", "message_id", "type", "user_id", "app_id")


class Target(Protocol):
    """Sends a message; returns False if this broker cannot carry it."""

    def send(self, message: Message) -> bool: ...

    def close(self) -> None: ...


def queues_of(kind: str, number: int, reply_to: str) -> str:
    """The queue that a message of this kind goes to: tasks go to lanes and to direct lanes in turn."""
    if kind == "reply":
        return reply_to
    if kind == "beat":
        return direct_lane(REGISTRY_NODE)
    return direct_lane(NODE) if number % 3 == 0 else lane(kind, MODELS[kind])


class RedisTarget:
    def __init__(self, url: str, reply_to: str) -> None:
        self._client: Any = redis.Redis.from_url(url)
        self._reply_to = reply_to
        self._number = 0

    def send(self, message: Message) -> bool:
        self._number += 1
        for _ in range(message.copies):
            if message.kind in FANOUTS:
                key = "/llm.registry.offering_available" if message.kind == "registry" else ""
                for channel in {f"/0.{FANOUTS[message.kind]}", f"/0.{FANOUTS[message.kind]}{key}"}:
                    self._client.publish(channel, message.text)
            else:
                queue = queues_of(message.kind, self._number, self._reply_to)
                priority = "\x06\x166" if self._number % 2 and message.kind not in ("reply", "beat") else ""
                is_plain = message.kind == "reply" and message.stored is None and self._number % 2
                self._client.lpush(queue + priority, message.sample.body if is_plain else message.text)
        return True

    def close(self) -> None:
        self._client.close()


class RabbitMQTarget:
    def __init__(self, url: str, reply_to: str) -> None:
        parts = url_to_parts(url)
        self._options = {
            "host": f"{parts[1]}:{parts[2]}",
            "userid": parts[3],
            "password": parts[4],
            "virtual_host": "/",
            "connect_timeout": 10,
            "read_timeout": 20,
            "write_timeout": 20,
        }
        self._reply_to = reply_to
        self._number = 0
        self._connection: Any = None

    def send(self, message: Message) -> bool:
        self._number += 1
        if message.stored is not None:  # it is about what only Redis stores
            return False
        body, exchange, key = message.sample.body, "", ""
        if message.kind in FANOUTS:
            exchange, key = FANOUTS[message.kind], "llm.registry.offering_available"
        else:
            key = queues_of(message.kind, self._number, self._reply_to)
        try:
            for _ in range(message.copies):
                self._channel().basic_publish(amqp.Message(body, **properties(message)), exchange, key)
        except (amqp.AMQPError, OSError):
            self._drop()  # RabbitMQ refuses it
            return False
        except Exception:  # AMQP has no such value; half of a message may have been written
            self._drop()
            return False
        return True

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._connection.close()

    def _channel(self) -> Any:
        if self._connection is None:
            self._connection = amqp.Connection(**self._options)
            self._connection.connect()
        return self._connection.channel(1)

    def _drop(self) -> None:
        self.close()
        self._connection = None


def properties(message: Message) -> dict[str, Any]:
    """The properties of AMQP, as far as it can carry what was drawn."""
    sample = message.sample
    beside = sample.properties if isinstance(sample.properties, dict) else {}
    found = {name: _written(beside[name]) for name in PROPERTIES if beside.get(name) is not None}
    found["application_headers"] = _table(sample.headers) if isinstance(sample.headers, dict) else {}
    found |= {"content_type": _written(sample.content_type), "content_encoding": _written(sample.content_encoding)}
    if "priority" in found:
        found["priority"] = found["priority"] if type(found["priority"]) is int else 5
    return {name: value for name, value in found.items() if value is not None}


def _table(values: dict[str, Any]) -> dict[Any, Any]:
    return {key.encode("utf-8", "surrogatepass")[:255] or b"-": _written(value) for key, value in values.items()}


def _written(value: Any) -> Any:
    """What py-amqp can write: numbers of 64 bits, and text; half of a pair of surrogates is bytes that are no UTF-8."""
    if isinstance(value, dict):
        return _table(value)
    if isinstance(value, list):
        return [_written(each) for each in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        return float(value) if abs(value) < 10**300 else str(value)
    if not isinstance(value, str):
        return value
    if value in LARGE:
        return "L" * 100_000  # RabbitMQ takes no larger frame of headers
    if value in map(DEEP_MARK.format, DEEP):
        deep: Any = 1
        for _ in range(150):
            deep = [deep]
        return deep
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")
    return value


class Waiting:
    """What waits in the lanes of the fleet."""

    def __init__(self, app: Celery, url: str) -> None:
        self._connection = app.connection_for_read()
        self._channel, self._transport = connect(self._connection, 10.0).default_channel, transport_of(url)

    def wait_until_none(self, within: float) -> int:
        """Wait until nothing waits; return how many messages do after `within` seconds."""
        deadline = time.monotonic() + within
        while (left := self._count()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return left

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._connection.close()

    def _count(self) -> int:
        return sum(sum(depths(self._channel, self._transport, each)) for each in LANES)


TARGETS = {"valkey": RedisTarget, "rabbitmq": RabbitMQTarget}
