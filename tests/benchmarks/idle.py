"""The connections of many idle hosts to Redis: what they ask all the time, and when, is what the package does."""

from __future__ import annotations

import heapq
import random
import selectors
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from urllib.parse import urlsplit

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.control_listener import PING_EVERY
from fleet_worker.broker.redis_transport import Transport
from fleet_worker.broker.topology import direct_lane, lane, wake_key
from tests.benchmarks.minis import command

__all__ = ["idle_hosts"]

CELERY_HEARTBEAT_EVERY = 2.0
PRIORITIES = (b"", b"\x06\x163", b"\x06\x166", b"\x06\x169")


def idle_hosts(pipe: Pipe, broker_url: str, hosts: int, model: str) -> None:
    """Be so many hosts of a registry node and a node with one model, until the pipe says something.

    Each node reads its lanes, has a subscription that is pinged, and sends Celery's heartbeat.
    """
    idle = _Idle(broker_url)
    for number in range(hosts):
        inference, registry = direct_lane(f"local@mini-{number:04}"), direct_lane(f"registry@mini-{number:04}")
        for lanes in ([lane("chat", model), lane("stream_chat", model), inference], [registry]):
            idle.add(lanes)
    pipe.send("connected")
    while not pipe.poll():
        idle.turn()
    pipe.send("ended")


class _Idle:
    def __init__(self, broker_url: str) -> None:
        self._url = urlsplit(broker_url)
        self._selector = selectors.DefaultSelector()
        self._due: list[tuple[float, int, float, socket.socket, bytes]] = []
        """When what is sent on which connection, and how often."""
        app = create_app(Settings(broker_url=broker_url))
        self._ping = command(b"PING", b"redis-py-health-check")
        self._heartbeat = command(b"PUBLISH", f"/0.{app.conf.event_exchange}/worker.heartbeat".encode(), b"x" * 600)
        self._events = self._connected()

    def add(self, lanes: list[str]) -> None:
        """Add one node."""
        keys = [wake_key().encode(), *(name.encode() + priority for priority in PRIORITIES for name in lanes)]
        read = command(b"BRPOP", *keys, b"%g" % Transport.brpop_timeout)
        reader, subscriber = self._connected(), self._connected()
        subscriber.sendall(command(b"PSUBSCRIBE", b"/0.llm.fleet.cancel", b"/0.llm.fleet.control.pidbox"))
        self._selector.register(reader, selectors.EVENT_READ, read)
        self._selector.register(subscriber, selectors.EVENT_READ, b"")
        reader.sendall(read)
        self._plan(PING_EVERY, subscriber, self._ping)
        self._plan(CELERY_HEARTBEAT_EVERY, self._events, self._heartbeat)

    def turn(self) -> None:
        """Read all that has come; read lanes again where nothing came; send what is due."""
        for key, _ in self._selector.select(0.005):
            key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            if key.data:
                key.fileobj.sendall(key.data)  # type: ignore[union-attr]
        for connection, sent in self._take_due():
            connection.sendall(sent)

    def _take_due(self) -> Iterator[tuple[socket.socket, bytes]]:
        now = time.monotonic()
        while self._due[0][0] <= now:
            moment, number, every, connection, sent = self._due[0]
            heapq.heapreplace(self._due, (moment + every, number, every, connection, sent))
            yield connection, sent

    def _plan(self, every: float, connection: socket.socket, sent: bytes) -> None:
        first = time.monotonic() + every * random.random()
        heapq.heappush(self._due, (first, len(self._due), every, connection, sent))

    def _connected(self) -> socket.socket:
        opened = socket.create_connection((self._url.hostname, self._url.port), timeout=10)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened
