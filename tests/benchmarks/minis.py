"""Many simulated nodes in one process, cheap enough to be measured against: they answer streams at an even pace.

Each is to the broker what a real node is: its frames travel in messages of its own, no closer together than a node's,
with an `alive` for each stream once a second; it asks whether the routers still listen, and its host reports its
status. Only their connections are shared: what many nodes push at one moment is one write.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import heapq
import json
import socket
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any, Protocol
from urllib.parse import urlsplit

import amqp
from kombu import Connection, Consumer, Message

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import receive
from fleet_worker.broker.topology import lane, lane_queue, listening_key, reply_queue, transport_of
from fleet_worker.node.reply_publisher import GAP_PER_REQUEST, HEARTBEAT_EVERY, LONGEST_GAP
from fleet_worker.node.router_presence import CHECK_EVERY
from fleet_worker.protocol.reply import Accepted, Alive, ChatResponse, Delta, Deltas, Frame, Reply, Timings, Usage
from fleet_worker.protocol.wire import PROTOCOL_VERSION

__all__ = ["Load", "Pushed", "run"]

TICK = 0.001
"""Seconds between two writes."""
ARRIVE_WITHIN = 60.0


@dataclass(frozen=True)
class Load:
    """So many nodes with so many streams each, of `rate` tokens a second, for so many seconds."""

    minis: int
    streams: int
    rate: float
    seconds: float = 10.0
    model: str = "sim-chat"

    @property
    def all_streams(self) -> int:
        return self.minis * self.streams

    @property
    def tokens(self) -> int:
        """Of each stream."""
        return round(self.rate * self.seconds)


@dataclass(frozen=True)
class Pushed:
    """When tokens were due, and when they were pushed: `time.monotonic()` seconds. Token k of stream s is number
    s * tokens + k."""

    due: array[float]
    at: array[float]
    messages: int
    cpu: float


def run(pipe: Pipe, broker_url: str, load: Load) -> None:
    """Answer all streams of a load at once when the last one has been asked for; send `Pushed` when all has ended."""
    app = create_app(Settings(broker_url=broker_url))
    transport = transport_of(broker_url)
    with app.connection_for_read() as connection:
        wire = (RedisWire if transport == "redis" else AmqpWire)(broker_url, connection)
        minis = [Mini(f"local@mini-{number:04}") for number in range(load.minis)]
        pipe.send("listening")
        with contextlib.suppress(EOFError):
            streams = _asked_for(connection, lane_queue(lane("stream_chat", load.model), transport), load, minis, wire)
            gc.freeze()
            pipe.send(_answer(streams, load, minis, wire))
            pipe.recv()


# --- What is due -----------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    number: int
    request_id: str
    reply_to: str
    mini: Mini
    delta: Delta
    appended: int = 1
    """Frames so far."""

    def frame(self, kind: Callable[..., Frame], seq: int, **fields: Any) -> Frame:
        return kind(id=self.request_id, attempt=1, seq=seq, **fields)

    def token(self, number: int) -> Frame:
        return self.frame(Deltas, number + 1, deltas=[self.delta], tokens=number + 1)

    def response(self, tokens: int) -> Frame:
        timings = Timings(queue_wait=0.0, ttft=0.0, duration=1.0, tokens_per_second=1.0)
        made_by = {"node": self.mini.node, "instance": "local", "model": "sim-chat"}
        return self.frame(ChatResponse, tokens + 1, usage=Usage(), timings=timings, finish_reason="stop", **made_by)


class Mini:
    """What one node has for its routers, and when it may push it."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.streams: dict[str, Stream] = {}
        self.pending: dict[str, list[Frame]] = {}
        """By reply queue."""
        self.tokens: list[int] = []
        """The numbers of the pending ones."""
        self.backlog = 0
        """Messages that waited for the router when this node pushed last."""
        self.next_push = 0.0

    def gap(self) -> float:
        """Seconds from one push to the next, as those of a real node."""
        return min(LONGEST_GAP, len(self.streams) * GAP_PER_REQUEST)

    def add(self, reply_to: str, frame: Frame) -> None:
        self.pending.setdefault(reply_to, []).append(frame)

    def add_heartbeats(self) -> None:
        for stream in self.streams.values():
            self.add(stream.reply_to, stream.frame(Alive, stream.appended))

    def take(self) -> Iterator[tuple[str, bytes]]:
        """Return each router's message, as its body."""
        for reply_to, frames in self.pending.items():
            yield reply_to, Reply(v=PROTOCOL_VERSION, node=self.node, frames=frames).encode()
        self.pending = {}


def _asked_for(connection: Connection, queue: Any, load: Load, minis: list[Mini], wire: Wire) -> list[Stream]:
    """Wait for all requests, and accept each."""
    streams: list[Stream] = []

    def accept(message: Message) -> None:
        envelope = message.payload[0][0]
        mini = minis[len(streams) % len(minis)]
        delta = Delta(content=f"{len(streams)} ")
        stream = Stream(len(streams), envelope["request_id"], envelope["reply_to"], mini, delta)
        streams.append(stream)
        mini.streams[stream.request_id] = stream
        mini.add(stream.reply_to, stream.frame(Accepted, 0, instance="local", queue_wait=0.0))
        wire.push([(mini, *each) for each in mini.take()])
        message.ack()

    deadline = time.monotonic() + ARRIVE_WITHIN
    with Consumer(connection.channel(), [queue], on_message=accept):
        while len(streams) < load.all_streams and time.monotonic() < deadline:
            receive(connection, 0.1)
    if len(streams) < load.all_streams:
        raise RuntimeError(f"{len(streams)} of {load.all_streams} streams were asked for")
    return streams


def _answer(streams: list[Stream], load: Load, minis: list[Mini], wire: Wire) -> Pushed:
    total, interval, began = load.tokens, 1 / load.rate, time.monotonic() + 0.2
    due, at = array("d", bytes(8 * len(streams) * total)), array("d", bytes(8 * len(streams) * total))
    heap = [(began + interval * number / len(streams), number, 0) for number in range(len(streams))]
    beats = [(began + HEARTBEAT_EVERY * number / len(minis), number) for number in range(len(minis))]
    asks = [(began + CHECK_EVERY * number / len(minis), number) for number in range(len(minis))]
    reply_queues = {stream.reply_to for stream in streams}
    waiting: set[Mini] = set()
    messages, cpu = 0, time.process_time()
    while heap or waiting:
        now = time.monotonic()
        while heap and heap[0][0] <= now:
            moment, number, token = heapq.heappop(heap)
            stream = streams[number]
            waiting.add(stream.mini)
            if token == total:
                stream.mini.add(stream.reply_to, stream.response(total))
                del stream.mini.streams[stream.request_id]
                stream.mini.next_push = now
                continue
            stream.mini.add(stream.reply_to, stream.token(token))
            stream.mini.tokens.append(number * total + token)
            stream.appended += 1
            due[number * total + token] = moment
            heapq.heappush(heap, (moment + (interval if token + 1 < total else 0.0), number, token + 1))
        for number in _due(beats, now, HEARTBEAT_EVERY):
            if minis[number].streams:
                minis[number].add_heartbeats()
                waiting.add(minis[number])
        ready = [mini for mini in waiting if mini.next_push <= now]
        bodies = [(mini, *each) for mini in ready for each in mini.take()]
        for mini in ready:
            for number in mini.tokens:
                at[number] = now
            mini.tokens = []
            mini.next_push = now + mini.gap()
        waiting.difference_update(ready)
        wire.push(bodies)
        wire.ask(reply_queues, sum(1 for _ in _due(asks, now, CHECK_EVERY)))
        messages += len(bodies)
        next_one = heap[0][0] if heap and not waiting else 0.0
        time.sleep(max(0.0, max(next_one, now + TICK) - time.monotonic()))
    return Pushed(due, at, messages, time.process_time() - cpu)


def _due(times: list[tuple[float, int]], now: float, every: float) -> Iterator[int]:
    """Yield the numbers whose time has come, each of which has its next one then."""
    while times[0][0] <= now:
        moment, number = times[0]
        heapq.heapreplace(times, (moment + every, number))
        yield number


# --- To the broker ---------------------------------------------------------------------------------------------------


class Wire(Protocol):
    """The connection of all nodes."""

    def push(self, bodies: list[tuple[Mini, str, bytes]]) -> None:
        """Publish each body to its reply queue, all of them with one write; tell each node the backlog there."""

    def ask(self, reply_queues: Iterable[str], times: int) -> None:
        """Ask so many times whether these routers listen."""


class RedisWire:
    """Writes commands, and reads nothing but lengths: redis-py needs more time for it than the broker."""

    def __init__(self, broker_url: str, connection: Connection) -> None:
        self._url = urlsplit(broker_url)
        self._envelope = _Envelope(connection)
        self._socket, self._asking = self._connected(), self._connected()
        self._asking.setblocking(False)
        self._received = b""

    def push(self, bodies: list[tuple[Mini, str, bytes]]) -> None:
        if not bodies:
            return
        commands: list[bytes] = []
        for _, reply_to, body in bodies:
            expires = str(round(1000 * reply_queue(reply_to).expires))
            commands += [
                _command(b"LPUSH", reply_to.encode(), self._envelope.encoded(reply_to, body)),
                _command(b"PEXPIRE", reply_to.encode(), expires.encode()),
            ]
        self._socket.sendall(b"".join(commands))
        for (mini, *_), answer in zip(bodies, self._answers(2 * len(bodies))[::2], strict=True):
            mini.backlog = answer

    def ask(self, reply_queues: Iterable[str], times: int) -> None:
        if times:
            keys = [listening_key(name).encode() for name in reply_queues]
            command = _command(b"PUBSUB", b"NUMSUB", *keys) + _command(b"MGET", *keys)
            self._asking.sendall(command * times)
        with contextlib.suppress(BlockingIOError):
            self._asking.recv(1 << 20)

    def _connected(self) -> socket.socket:
        opened = socket.create_connection((self._url.hostname, self._url.port), timeout=10)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened

    def _answers(self, count: int) -> list[int]:
        while self._received.count(b"\r\n") < count:
            self._received += self._socket.recv(1 << 16)
        lines, self._received = self._received.split(b"\r\n"), b""
        if refused := [line for line in lines if line.startswith(b"-")]:
            raise RuntimeError(f"the broker refuses {len(refused)} replies")
        return [int(line[1:]) for line in lines[:count]]


class _Envelope:
    """How a reply travels on Redis, which has no headers: as kombu wraps it, made once for each reply queue."""

    def __init__(self, connection: Connection) -> None:
        self._channel = connection.channel()
        self._made: dict[str, tuple[bytes, bytes]] = {}

    def encoded(self, reply_to: str, body: bytes) -> bytes:
        if reply_to not in self._made:
            self._made[reply_to] = self._make(reply_to)
        before, after = self._made[reply_to]
        return before + base64.b64encode(body) + after

    def _make(self, reply_to: str) -> tuple[bytes, bytes]:
        mark = b"body"
        json_in_utf8 = {"content_type": "application/json", "content_encoding": "utf-8"}
        message = self._channel.prepare_message(mark, properties={"delivery_mode": 1}, **json_in_utf8)
        self._channel._inplace_augment_message(message, "", reply_to)
        before, _, after = json.dumps(message).encode().partition(base64.b64encode(mark))
        return before, after


def _command(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


class AmqpWire:
    """Publishes without confirms: those of many nodes would cost this one process what each of them pays for itself."""

    def __init__(self, broker_url: str, connection: Connection) -> None:
        url = urlsplit(broker_url)
        self._connection = amqp.Connection(f"{url.hostname}:{url.port}", url.username, url.password, heartbeat=0)
        self._connection.connect()
        self._channel = self._connection.channel()

    def push(self, bodies: list[tuple[Mini, str, bytes]]) -> None:
        for _, reply_to, body in bodies:
            message = amqp.Message(
                body, content_type="application/json", content_encoding="utf-8", delivery_mode=1, priority=0
            )
            self._channel.basic_publish(message, routing_key=reply_to)

    def ask(self, reply_queues: Iterable[str], times: int) -> None:
        for name in reply_queues:
            for _ in range(times):
                self._channel.queue_declare(name, passive=True)
