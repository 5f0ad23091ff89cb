"""Many simulated nodes in one process, cheap enough to be measured against: they answer streams at an even pace.

Each is to the broker what a real node is. Its frames wait in an `Outbox` of the package, so they travel in messages of
its own, as rarely as those of a real node with that load and a router that far behind, and heartbeats with them; what
waits of one stream is one frame. It asks whether the router still listens, and its host reports its status. Only the
connections of all nodes are shared: what many push at one moment is one write. Frames are bytes that were made before,
but for their numbers.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import socket
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any, Protocol
from urllib.parse import urlsplit

import amqp
from kombu import Connection, Consumer, Message

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import receive
from fleet_worker.broker.topology import expiry, lane, lane_queue, listening_key, transport_of
from fleet_worker.node.outbox import MOST_JOINED, NEVER, Outbox
from fleet_worker.node.reply_publisher import HEARTBEAT_EVERY, HEARTBEAT_WITHIN
from fleet_worker.node.router_presence import CHECK_EVERY
from fleet_worker.protocol.reply import Accepted, Alive, ChatResponse, Delta, Deltas, Frame, Reply, Timings, Usage
from fleet_worker.protocol.wire import PROTOCOL_VERSION

__all__ = ["Load", "Pushed", "command", "run"]

TICK = 0.001
"""Seconds between two writes."""
ARRIVE_WITHIN = 60.0


@dataclass(frozen=True)
class Load:
    """So many nodes with so many streams each, of `rate` tokens a second, for so many seconds. One router asks for all
    of them."""

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

    def due(self, began: float) -> Iterator[float]:
        """Yield when each token is due, all streams taking turns: token k of stream s is number
        k * all_streams + s."""
        step = 1 / (self.rate * self.all_streams)
        return (began + step * number for number in range(self.all_streams * self.tokens))


@dataclass(frozen=True)
class Pushed:
    """What the nodes have done. Times are `time.monotonic()` seconds."""

    began: float
    """When the first token was due."""
    at: array[float]
    """When each token was pushed, by its number."""
    late: array[float]
    """By how many seconds each message was pushed later than a real node would have pushed it."""
    cpu: float

    @property
    def messages(self) -> int:
        return len(self.late)


def run(pipe: Pipe, broker_url: str, load: Load) -> None:
    """Answer all streams of a load at once when the last one has been asked for; send `Pushed` when all has ended."""
    app = create_app(Settings(broker_url=broker_url))
    transport = transport_of(broker_url)
    with app.connection_for_read() as connection:
        wire = (RedisWire if transport == "redis" else AmqpWire)(broker_url)
        pipe.send("listening")
        with contextlib.suppress(EOFError):
            streams = _asked_for(connection, lane_queue(lane("stream_chat", load.model), transport), load, wire)
            gc.freeze()
            pipe.send(_Fleet(streams, load, wire).answer())
            pipe.recv()


# --- The nodes -------------------------------------------------------------------------------------------------------


class Mini:
    """What one node has for its router."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.node = f"local@mini-{number:04}"
        self.reply_to = ""
        self.outbox: Any = Outbox()
        """Of frames as bytes."""
        self.tokens: list[int] = []
        """The numbers of those that are in it."""
        self.running: set[Stream] = set()
        self.beats = False
        """Whether its next message is a heartbeat, too."""
        self.queued = NEVER
        """When it is looked at next."""
        self._begin = Reply(v=PROTOCOL_VERSION, node=self.node, frames=[]).encode().removesuffix(b"]}")

    def plan_heartbeat(self, now: float) -> None:
        if self.running:
            self.outbox.due, self.beats = min(self.outbox.due, now + HEARTBEAT_WITHIN), True

    def take(self, now: float) -> bytes:
        """Return its message."""
        frames = self.outbox.take(now)
        for stream in self.running:
            stream.waiting = bytearray()
        if self.beats:
            frames += [stream.frame(Alive, stream.frames) for stream in self.running]
            self.beats = False
        return self.body(frames)

    def body(self, frames: list[bytes]) -> bytes:
        return b"%b%b]}" % (self._begin, b",".join(frames))


class Stream:
    def __init__(self, number: int, request_id: str, mini: Mini) -> None:
        self.mini = mini
        self.frames = 1
        """So many it has sent."""
        self.waiting = bytearray()
        """Its last frame while that is in the outbox."""
        self._joined = 0
        """Tokens in that."""
        self._about: dict[str, Any] = {"id": request_id, "attempt": 1}
        delta = Delta(content=f"{number} ")
        numbered = self.frame(Deltas, _NUMBER, deltas=[delta], tokens=_NUMBER)
        self._first = numbered.replace(b"%d" % _NUMBER, b"%d")
        self._next = b"," + delta.model_dump_json(exclude_none=True).encode() + self._first[self._first.index(b"]") :]

    def frame(self, kind: type[Frame], seq: int, **fields: Any) -> bytes:
        return kind(**self._about, seq=seq, **fields).model_dump_json(exclude_none=True).encode()

    def generate(self, token: int, requests: int) -> None:
        """Put a token into the outbox of its node: into the last frame of this stream, if that is still there."""
        if self.waiting and self._joined < MOST_JOINED:
            self.waiting[self.waiting.rindex(b"]") :] = self._next % (token + 1)
            self._joined += 1
        else:
            self.waiting, self._joined = bytearray(self._first % (self.frames, token + 1)), 1
            self.mini.outbox.append(self.waiting, None if token else 0.0, requests)
            self.frames += 1

    def response(self) -> bytes:
        timings = Timings(queue_wait=0.0, ttft=0.0, duration=1.0, tokens_per_second=1.0)
        made_by = {"node": self.mini.node, "instance": "local", "model": "sim-chat"}
        return self.frame(ChatResponse, self.frames, usage=Usage(), timings=timings, finish_reason="stop", **made_by)


_NUMBER = 2**52 + 1
"""Stands for a number in a frame that is made before."""


def _asked_for(connection: Connection, queue: Any, load: Load, wire: Wire) -> list[Stream]:
    """Wait for all requests, and accept each."""
    minis = [Mini(number) for number in range(load.minis)]
    streams: list[Stream] = []

    def accept(message: Message) -> None:
        envelope = message.payload[0][0]
        mini = minis[len(streams) % len(minis)]
        mini.reply_to = envelope["reply_to"]
        stream = Stream(len(streams), envelope["request_id"], mini)
        streams.append(stream)
        mini.running.add(stream)
        wire.push([(mini, mini.body([stream.frame(Accepted, 0, instance="local", queue_wait=0.0)]))])
        message.ack()

    deadline = time.monotonic() + ARRIVE_WITHIN
    with Consumer(connection.channel(), [queue], on_message=accept):
        while len(streams) < load.all_streams and time.monotonic() < deadline:
            receive(connection, 0.1)
    if len(streams) < load.all_streams:
        raise RuntimeError(f"{len(streams)} of {load.all_streams} streams were asked for")
    return streams


class _Fleet:
    """All nodes, while they answer."""

    def __init__(self, streams: list[Stream], load: Load, wire: Wire) -> None:
        self._streams, self._load, self._wire = streams, load, wire
        self._minis = list({stream.mini.number: stream.mini for stream in streams}.values())
        self._count = len(streams) * load.tokens
        self._generated = 0
        self._began = 0.0
        """When the first token is due."""
        self._queue: list[tuple[float, int]] = []
        """When which node has something to push."""
        self._at = array("d", bytes(8 * self._count))
        self._late = array("d")

    def answer(self) -> Pushed:
        began = self._began = time.monotonic() + 0.2
        cpu = time.process_time()
        asks, beats = (
            [(began + every * number / len(self._minis), number) for number in range(len(self._minis))]
            for every in (CHECK_EVERY, HEARTBEAT_EVERY)
        )
        while self._generated < self._count or self._queue:
            now = time.monotonic()
            self._generate(int((now - began) * self._load.rate * len(self._streams)) + 1 if now >= began else 0)
            for number in _due(beats, now, HEARTBEAT_EVERY):
                self._minis[number].plan_heartbeat(now)
                self._look_at(self._minis[number])
            self._push()
            asking = list(_due(asks, now, CHECK_EVERY))
            if (waiting := self._wire.ask({self._minis[0].reply_to}, len(asking))) is not None:
                for number in asking:
                    self._minis[number].outbox.learn(waiting)
            time.sleep(max(0.0, now + TICK - time.monotonic()))
        return Pushed(began, self._at, self._late, time.process_time() - cpu)

    def _generate(self, until: int) -> None:
        """Let all tokens up to that number come, as they come from MLX servers."""
        until, streams, last = min(until, self._count), self._streams, self._load.tokens - 1
        for number in range(self._generated, until):
            token, position = divmod(number, len(streams))
            stream = streams[position]
            mini = stream.mini
            mini.tokens.append(number)
            stream.generate(token, len(mini.running))
            if token == last:
                mini.outbox.append(stream.response(), 0.0, len(mini.running))
                mini.running.discard(stream)
            self._look_at(mini)
        self._generated = until

    def _generated_at(self, mini: Mini) -> float:
        """Return when the first of its tokens came: its gap may have been over long before."""
        return self._began + (mini.tokens[0] if mini.tokens else 0) / (self._load.rate * len(self._streams))

    def _look_at(self, mini: Mini) -> None:
        if mini.outbox.due < mini.queued:
            mini.queued = mini.outbox.due
            heapq.heappush(self._queue, (mini.queued, mini.number))

    def _push(self) -> None:
        """Push what is due of all nodes."""
        now, pushed = time.monotonic(), []
        while self._queue and self._queue[0][0] <= now:
            due, number = heapq.heappop(self._queue)
            mini = self._minis[number]
            mini.queued = NEVER
            if mini.outbox.due <= now:
                self._late.append(now - max(due, self._generated_at(mini)))
                pushed.append((mini, mini.take(now)))
                for token in mini.tokens:
                    self._at[token] = now
                mini.tokens = []
            self._look_at(mini)
        self._wire.push(pushed)


def _due(times: list[tuple[float, int]], now: float, every: float) -> Iterator[int]:
    """Yield the numbers whose time has come, each of which has its next one then."""
    while times[0][0] <= now:
        moment, number = times[0]
        heapq.heapreplace(times, (moment + every, number))
        yield number


# --- To the broker ---------------------------------------------------------------------------------------------------


class Wire(Protocol):
    """The connection of all nodes."""

    def push(self, bodies: list[tuple[Mini, bytes]]) -> None:
        """Publish each body to its reply queue, all of them with one write; tell each node the backlog there."""

    def ask(self, reply_queues: Iterable[str], times: int) -> int | None:
        """Ask so many times whether these routers listen; return how many messages wait, if that is told then."""


class RedisWire:
    """Writes commands, and reads nothing but lengths: redis-py needs more time for it than the broker."""

    def __init__(self, broker_url: str) -> None:
        self._url = urlsplit(broker_url)
        self._socket, self._asking = self._connected(), self._connected()
        self._asking.setblocking(False)

    def push(self, bodies: list[tuple[Mini, bytes]]) -> None:
        if not bodies:
            return
        self._socket.sendall(b"".join(_pushes(mini.reply_to, body) for mini, body in bodies))
        for (mini, _), length in zip(bodies, self._answers(2 * len(bodies))[::2], strict=True):
            mini.outbox.learn(length)

    def ask(self, reply_queues: Iterable[str], times: int) -> None:
        if times:
            keys = [listening_key(name).encode() for name in reply_queues]
            question = command(b"PUBSUB", b"NUMSUB", *keys) + command(b"MGET", *keys)
            self._asking.sendall(question * times)
            with contextlib.suppress(BlockingIOError):
                self._asking.recv(1 << 20)

    def _connected(self) -> socket.socket:
        opened = socket.create_connection((self._url.hostname, self._url.port), timeout=10)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened

    def _answers(self, count: int) -> list[int]:
        received = b""
        while received.count(b"\r\n") < count:
            received += self._socket.recv(1 << 16)
        lines = received.split(b"\r\n")
        if refused := [line for line in lines if line.startswith(b"-")]:
            raise RuntimeError(f"the broker refuses {len(refused)} replies")
        return [int(line[1:]) for line in lines[:count]]


def _pushes(reply_to: str, body: bytes) -> bytes:
    """As `broker.replies.push` does."""
    key = reply_to.encode()
    return command(b"LPUSH", key, body) + command(b"PEXPIRE", key, b"%d" % (1000 * expiry(reply_to)))


def command(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


class AmqpWire:
    """Publishes without confirms: those of many nodes would cost this one process what each of them pays for itself."""

    def __init__(self, broker_url: str) -> None:
        url = urlsplit(broker_url)
        self._connection = amqp.Connection(f"{url.hostname}:{url.port}", url.username, url.password, heartbeat=0)
        self._connection.connect()
        self._channel = self._connection.channel()

    def push(self, bodies: list[tuple[Mini, bytes]]) -> None:
        for mini, body in bodies:
            message = amqp.Message(
                body, content_type="application/json", content_encoding="utf-8", delivery_mode=1, priority=0
            )
            self._channel.basic_publish(message, routing_key=mini.reply_to)

    def ask(self, reply_queues: Iterable[str], times: int) -> int | None:
        asked = [self._channel.queue_declare(name, passive=True) for name in reply_queues for _ in range(times)]
        return asked[-1].message_count if asked else None
