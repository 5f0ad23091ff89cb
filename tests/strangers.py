"""Someone who may use the broker, and sends what no program of ours would."""

from __future__ import annotations

import base64
import json
from typing import Any, Self

import amqp
import redis
from kombu.utils.url import url_to_parts

JSON = {"content-type": "application/json", "content-encoding": "utf-8"}


class Stranger:
    """Sends to queues and fanout exchanges of a broker, past kombu."""

    def __init__(self, url: str) -> None:
        self.on_redis = url.startswith("redis")
        if self.on_redis:
            self._redis: Any = redis.Redis.from_url(url)
        else:
            _, host, port, user, password, *_ = url_to_parts(url)
            self._connection = amqp.Connection(f"{host}:{port}", user, password)
            self._connection.connect()
            self._channel = self._connection.channel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        (self._redis if self.on_redis else self._connection).close()

    def send(self, queue: str, body: bytes, headers: Any = None, **changes: Any) -> None:
        """Send a message like kombu's, with other headers, content types or encodings."""
        if self.on_redis:
            self.push(queue, wrapped(body, headers, **changes))
        else:
            self._publish("", queue, body, headers, changes)

    def broadcast(self, exchange: str, body: bytes, headers: Any = None, *, key: str = "", **changes: Any) -> None:
        if self.on_redis:
            self._redis.publish(f"/0.{exchange}", wrapped(body, headers, **changes))
        else:
            self._publish(exchange, key, body, headers, changes)

    def push(self, queue: str, item: bytes) -> None:
        """Redis: an item of a list, as it is."""
        self._redis.lpush(queue, item)

    def publish(self, exchange: str, item: bytes) -> None:
        """Redis: a message of a channel, as it is."""
        self._redis.publish(f"/0.{exchange}", item)

    def _publish(self, exchange: str, key: str, body: bytes, headers: Any, changes: dict[str, Any]) -> None:
        names = {name.replace("-", "_"): value for name, value in {**JSON, **changes}.items()}
        message = amqp.Message(body, application_headers=headers or {}, **names)
        self._channel.basic_publish(message, exchange=exchange, routing_key=key)


def wrapped(body: bytes, headers: Any = None, **changes: Any) -> bytes:
    """Return a message as kombu's Redis transport wraps it."""
    properties = {"body_encoding": "base64", "delivery_tag": "x", "delivery_info": {}, "priority": 0}
    message = {"body": base64.b64encode(body).decode(), **JSON, "headers": headers or {}, "properties": properties}
    return json.dumps({**message, **changes}).encode()
