"""One good message of each kind that the processes of a fleet receive, taken from a broker as kombu wrote it there."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import redis

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import ask_exchange, cancel_exchange, direct_lane, lane, lane_queue, reply_name
from fleet_worker.errors import InvalidRequest
from fleet_worker.node.reply_publisher import ReplyPublisher
from fleet_worker.protocol.cache_digest import CacheDigest, DigestMessage, DigestsWanted
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.registry_event import Announcement, RegistryEvent
from fleet_worker.protocol.request import ControlMessage, FleetRequest
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.publisher import RegistryPublisher
from fleet_worker.router.submitter import Submitter
from fleet_worker.testing import embedded_broker
from tests.envelopes import envelope, user

CHAT, EMBED = "sim-chat", "sim-embed"
MODELS = {"chat": CHAT, "stream_chat": CHAT, "embed": EMBED}
NOBODY = reply_name("nobody", 30)
"""A reply queue that nobody reads."""


@dataclass
class Sample:
    """A message: its body, and what travels beside it, named as kombu writes it into Redis."""

    kind: str
    body: bytes
    headers: Any = field(default_factory=dict)
    properties: Any = field(default_factory=dict)
    content_type: Any = "application/json"
    content_encoding: Any = "utf-8"

    @classmethod
    def read(cls, kind: str, stored: bytes) -> Sample:
        """Read what kombu has pushed or published, or a reply, which is not wrapped."""
        message = json.loads(stored)
        if "body" not in message:
            return cls(kind, stored)
        body = base64.b64decode(message["body"])
        return cls(
            kind, body, message["headers"], message["properties"], message["content-type"], message["content-encoding"]
        )

    def stored(self) -> Any:
        """What kombu would push or publish; JSON."""
        return {
            "body": base64.b64encode(self.body).decode(),
            "content-encoding": self.content_encoding,
            "content-type": self.content_type,
            "headers": self.headers,
            "properties": self.properties,
        }


def samples() -> dict[str, Sample]:
    """By kind: `chat`, `stream_chat`, `embed`, `beat`, `control`, `cancel`, `ask`, `want_digests`, `registry`,
    `digest`, `reply`."""
    with embedded_broker() as url, redis.Redis.from_url(url) as client, create_app(Settings(broker_url=url)) as app:
        found = {}
        for kind, model in MODELS.items():
            Submitter(app, "redis").submit(request(kind), lane(kind, model), patience=5.0)
            found[kind] = _pushed(client, lane(kind, model))
        beats = lane_queue(direct_lane("registry@test"), "redis")
        with app.connection_for_write() as connection:
            app.send_task("registry.publish_models", connection=connection, queue=beats, expires=20)
        found["beat"] = _pushed(client, beats.name)
        publisher = ReplyPublisher(app.connection_for_write, "one@elsewhere", max_pending=10)
        with publisher.reply("r-1", 1, NOBODY) as reply:
            reply.accept(instance="one", queue_wait=0.0)
            reply.fail(InvalidRequest("no"))
        publisher.close()
        found["reply"] = _pushed(client, NOBODY)
        with _listening(client) as published:
            app.control.broadcast("stats", destination=["one@test"], reply=True, timeout=0.05)
            found["control"] = published()
            notice = ControlMessage(node="one@test", cancelled=[("r-1", 1)])
            Submitter(app, "redis").broadcast(cancel_exchange(), notice.encode())
            found["cancel"] = published()
            Submitter(app, "redis").broadcast(ask_exchange(), b"{}")
            found["ask"] = published()
            wanted = DigestsWanted(v=1, hosts=3, seconds=90.0)
            Submitter(app, "redis").broadcast(ask_exchange(), wanted.encode())
            found["want_digests"] = published()
            announcer = RegistryPublisher(app.connection_for_write, "redis", lambda kinds: announcements())
            announcer.publish("readiness")
            found["registry"] = published()
            digest = CacheDigest(node="one@test", slots=4, running=1, prefill_speed=262.5, held=["iB4CYvjf5XQ"])
            announcer.publish_digest(DigestMessage(v=1, host="test", interval=1.0, digests=[digest]).encode())
            found["digest"] = published()
            announcer.close()
        return {kind: Sample.read(kind, stored) for kind, stored in found.items()}


def request(operation: str) -> FleetRequest:
    params: Any = {"input": ["Hello"]} if operation == "embed" else {"messages": [user()], "max_tokens": 2}
    changes = {
        "operation": operation,
        "params": params,
        "model": MODELS[operation],
        "reply_to": NOBODY,
        "timeout_seconds": 3600.0,
    }
    built = FleetRequest.build(envelope(**changes, expires_at=time.time() + 3600))
    assert operation == "embed" or isinstance(built.params, ChatParams)
    return built


def announcements() -> Iterator[tuple[str, Announcement]]:
    status = InstanceStatus(host="elsewhere", name="one", node="one@elsewhere", status="available", slots=2, pid=1)
    event = RegistryEvent.about(status)
    yield event.event_type, Announcement(v=1, host="elsewhere", interval=15.0, events=[event])


def _pushed(client: Any, queue: str) -> bytes:
    """The message in a list of this queue; each priority has a list."""
    (key,) = [key for key in client.scan_iter(f"{queue}*") if client.type(key) == b"list"]
    found = client.rpop(key)
    assert isinstance(found, bytes)
    return found


@contextmanager
def _listening(client: Any) -> Iterator[Callable[[], bytes]]:
    """Yield a function that waits for what is published next."""
    with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.psubscribe("*")
        pubsub.get_message(timeout=0.1)

        def published() -> bytes:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                message = pubsub.get_message(timeout=0.1)
                if message and b"keyspace" not in message["channel"]:
                    data = message["data"]
                    assert isinstance(data, bytes)
                    return data
            raise AssertionError("nothing was published")

        yield published
