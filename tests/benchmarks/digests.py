"""The digests of many hosts whose nodes all run something, and a router that hears them."""

from __future__ import annotations

import heapq
import random
import secrets
import time
from multiprocessing.connection import Connection as Pipe
from typing import Any

from kombu import Connection, Consumer, Producer

from fleet_worker import Router, Settings
from fleet_worker.broker.topology import ask_queue, digest_exchange, transport_of
from fleet_worker.protocol.cache_digest import CacheDigest, DigestMessage, DigestsWanted
from fleet_worker.registry.digests import DigestPace
from fleet_worker.router.affinity.affinity import Affinity
from tests.benchmarks.registry import drain

__all__ = ["busy_hosts", "listening_router"]

HELD = 60
"""Ids in a digest: those of a server that keeps ten prompts."""
NEW = 3
"""Ids that differ from one digest of a node to the next."""


def busy_hosts(pipe: Pipe, broker_url: str, hosts: int) -> None:
    """Publish the digests of so many hosts of one node, when the package says that they are due."""
    played = [_Host(f"mini-{number:04}") for number in range(hosts)]
    due: list[tuple[float, int]] = []

    def answer(message: Any) -> None:
        if "seconds" in message.payload:
            wanted = DigestsWanted.model_validate(message.payload)
            for host in played:
                host.pace.extend(wanted)
            due[:] = sorted((time.monotonic() + host.due_in(), number) for number, host in enumerate(played))

    with Connection(broker_url) as publishing, Connection(broker_url) as listening:
        producer = Producer(publishing.channel(), digest_exchange())
        with Consumer(listening.channel(), [ask_queue(transport_of(broker_url))], on_message=answer, no_ack=True):
            drain(listening, 0.01)
            pipe.send("listening")
            while not pipe.poll():
                drain(listening, max(0.001, min(0.05, due[0][0] - time.monotonic()) if due else 0.05))
                while due and due[0][0] <= time.monotonic():
                    host = played[due[0][1]]
                    producer.publish(host.message(), content_type="application/json", content_encoding="utf-8")
                    heapq.heapreplace(due, (time.monotonic() + host.due_in(), due[0][1]))
    pipe.send("ended")


class _Host:
    def __init__(self, name: str) -> None:
        self._name = name
        self.pace = DigestPace()
        self._held = [_id() for _ in range(HELD)]
        self._digests: list[CacheDigest] = []
        self._change()

    def due_in(self) -> float:
        return self.pace.due_in(self._digests)

    def message(self) -> bytes:
        self._change()
        self.pace.publishing(self._digests)
        return DigestMessage(v=1, host=self._name, interval=self.pace.interval, digests=self._digests).encode()

    def _change(self) -> None:
        self._held = self._held[NEW:] + [_id() for _ in range(NEW)]
        speeds = {"prefill_left": random.uniform(0, 9), "prefill_speed": 262.1, "decode_speed": 31.5}
        self._digests = [
            CacheDigest(node=f"local@{self._name}", slots=4, running=2, held=list(self._held), **speeds),
        ]


def _id() -> str:
    return secrets.token_urlsafe(8)


def listening_router(pipe: Pipe, broker_url: str, hosts: int, affinity: bool) -> None:
    """Connect a router, say when it knows all hosts, and tell when it is asked how many digests it has received so far,
    and how many seconds they took it beyond what reading from the broker did."""
    count, taken, receive = 0, 0.0, Affinity.receive

    def timed(self: Affinity, body: bytes) -> list[CacheDigest]:
        nonlocal count, taken
        began = time.thread_time()
        digests = receive(self, body)
        taken += time.thread_time() - began
        count += 1
        return digests

    Affinity.receive = timed  # type: ignore[method-assign]
    router_settings: Any = {"affinity": affinity}
    with Router(Settings(broker_url=broker_url, router=router_settings)) as router:
        while len(router.registry.instances()) < hosts or (affinity and not count):
            time.sleep(0.05)
        pipe.send("knows all")
        while pipe.recv():
            pipe.send((count, taken))
