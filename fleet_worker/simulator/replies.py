"""One reply of a simulated MLX server on the wire, whole, or broken on purpose in a chosen way.

A fault is a small function in one of the tables below, by the moment it strikes: `ANSWERS` before the reply,
`INTERRUPTIONS` at a token, `WRITES` in the bytes of every event. Those that only change what is sent are in `manners`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

from fleet_worker.simulator.answers import Answer
from fleet_worker.simulator.chunks import Chunks
from fleet_worker.simulator.flavours import Flavour
from fleet_worker.simulator.manners import ENDINGS, EVENTS, VECTORS


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure of the next request that it fits, or of the next `times` such requests (None: all).

    It fits a request whose path is `path` (without one: every chat request, every embedding request for a fault in
    vectors, both for a fault before the reply) and whose body contains `contains`. Faults strike in the order given.
    """

    kind: str
    at_token: int = 0  # after this many tokens
    times: int | None = 1
    path: str | None = None
    contains: str = ""
    seconds: float = 0.005  # how late, or between two pieces
    status: int = 500
    body: Any = None  # a string is sent as text/plain, anything else as JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "the simulated generation failed"
    code: int | str = 500

    def __post_init__(self) -> None:
        if not any(self.kind in table for table in TABLES):
            raise ValueError(f"no such fault: {self.kind}")

    def fits(self, path: str, raw: bytes) -> bool:
        """Whether it can strike this request."""
        chat, embed = path.endswith("/chat/completions"), path.endswith("/embeddings")
        here = embed if self.kind in VECTORS else chat or (embed and self.kind in ANSWERS)
        return (here if self.path is None else path == self.path) and self.contains.encode() in raw

    def used(self) -> list[Fault]:
        """The faults to plan in its place after one request: itself with one time less, or none."""
        times = None if self.times is None else self.times - 1
        return [] if times == 0 else [replace(self, times=times)]


class Reply:
    """One HTTP response, framed as the flavour's server frames it."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        flavour: Flavour,
        *,
        flush_each: bool = False,
    ) -> None:
        self.flavour = flavour
        self.flush_each = flush_each
        self.started = False
        self._sent = False  # an event
        self.on_end: Callable[[], None] = lambda: None  # called just before the last bytes of a complete reply
        self.closes = flavour.http10  # the connection ends with this reply
        self.writes: Callable[[Reply, Sequence[bytes]], list[bytes]] | None = None
        self.pause = 0.0  # between two writes of one event
        self.manner: Callable[[Sequence[bytes], bool], list[bytes]] | None = None  # the events sent in their place
        self.gzip: Any = None  # compresses what is sent
        self.kill: Callable[[], None] = lambda: None  # the whole server
        self._reader, self._writer = reader, writer

    @property
    def left(self) -> bool:
        """Whether the client has closed its side."""
        return self._reader.at_eof() or self._writer.transport.is_closing()

    async def whole(self, answer: Answer, *, sized: bool = False) -> None:
        """Send a complete response. mlx_lm.server 0.32 names the length of a chat reply only, and of no error."""
        body = self.gzip.compress(answer.body) + self.gzip.flush() if self.gzip else answer.body
        headers = [("content-type", answer.content_type), *answer.headers]
        if sized or not self.flavour.http10:
            headers.append(("content-length", str(len(body))))
        self.on_end()
        self._head(answer.status, headers)
        self._writer.write(body)
        await self._writer.drain()

    def start_stream(self) -> None:
        """Send the head of an event stream."""
        framing = [] if self.flavour.http10 else [("transfer-encoding", "chunked")]
        self._head(200, [("content-type", "text/event-stream"), ("cache-control", "no-cache"), *framing])

    def _head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        self.started = True
        version, server = (
            ("1.0", "BaseHTTP/0.6 Python/3.12.11") if self.flavour.http10 else ("1.1", self.flavour.server)
        )
        lines = [f"HTTP/{version} {status} {HTTPStatus(status).phrase}", f"server: {server}"]
        lines += [f"{name}: {value}" for name, value in headers] + ["content-encoding: gzip"] * bool(self.gzip)
        self._writer.write("\r\n".join([*lines, "", ""]).encode())

    async def send(self, events: Sequence[bytes]) -> None:
        """Send some events of the stream, and wait while the client is slower than we are."""
        if self.manner:
            events, self._sent = self.manner(events, not self._sent), True
        if self.gzip:
            events = [self.gzip.compress(b"".join(events)) + self.gzip.flush(zlib.Z_FULL_FLUSH)]
        if self.writes is None:
            for together in [[event] for event in events] if self.flush_each else [events]:
                self._writer.write(self.framed(together))
        else:
            for piece in self.writes(self, events):
                self._writer.write(piece)
                await asyncio.sleep(self.pause)
        await self._writer.drain()

    def framed(self, events: Sequence[bytes]) -> bytes:
        """The bytes of these events: each its own HTTP chunk, or bare where EOF ends the stream."""
        if self.flavour.http10:
            return b"".join(events)
        return b"".join([b"%x\r\n%b\r\n" % (len(event), event) for event in events])

    async def finish(self, events: Sequence[bytes]) -> None:
        """Send the last events, and end the stream."""
        self.on_end()
        await self.send(events)
        await self.end()

    async def end(self) -> None:
        """End the stream as a complete one ends."""
        if not self.started:
            self.closes = True
        elif not self.flavour.http10:
            self._writer.write(b"0\r\n\r\n")
            await self._writer.drain()

    async def truncate(self, event: bytes) -> None:
        """Send half an event, and close."""
        self.closes = True
        if self.started:
            framed = self.framed([event])
            self._writer.write(framed[: len(framed) // 2])
            await self._writer.drain()

    def reset(self) -> None:
        """Drop the connection so that the client sees a reset, not an end."""
        self.closes = True
        connection: socket.socket = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def silence(self) -> None:
        """Send nothing more, until the client leaves.

        Raises:
            ConnectionResetError: the client left.
        """
        await self._reader.read(1)
        raise ConnectionResetError("the client left")


# --- before the reply: True when the request is answered --------------------------------------------------------------


async def empty_reply(reply: Reply, fault: Fault) -> bool:
    """The connection closes without a response."""
    reply.closes = True
    return True


async def empty_body(reply: Reply, fault: Fault) -> bool:
    """200, and nothing: so mlx_lm.server 0.32 lists models when there is no model cache."""
    await reply.whole(Answer(200))
    return True


async def slow_headers(reply: Reply, fault: Fault) -> bool:
    await asyncio.sleep(fault.seconds)
    return False


async def status(reply: Reply, fault: Fault) -> bool:
    """A chosen status, body and headers; without a body, the flavour's own error."""
    text = isinstance(fault.body, str)
    answer = reply.flavour.error(fault.status, fault.message)
    if fault.body is not None:
        body = fault.body if text else json.dumps(fault.body)
        answer = Answer(fault.status, body.encode(), "text/plain; charset=utf-8" if text else "application/json")
    await reply.whole(Answer(answer.status, answer.body, answer.content_type, tuple(fault.headers.items())))
    return True


async def unstreamed(reply: Reply, fault: Fault) -> bool:
    """The whole completion as JSON, though a stream was asked for."""
    return False


async def gzip(reply: Reply, fault: Fault) -> bool:
    """The stream is compressed, though nobody asked for that."""
    reply.gzip = zlib.compressobj(wbits=31)
    return False


async def flood(reply: Reply, fault: Fault) -> bool:
    """A body without end, which repeats `body`; compressed for the code "gzip": a megabyte for a thousand bytes."""
    piece = (fault.body or " ").encode()
    piece *= 1 + 2**20 // len(piece)
    if fault.code == "gzip":
        await gzip(reply, fault)
    reply.start_stream()
    while not reply.left:
        await reply.send([piece])
    return True


async def thread_death(reply: Reply, fault: Fault) -> bool:
    """The generation thread ends before the request is read; the reply is that of a server without one."""
    return False


# --- at a token: True when the reply is over --------------------------------------------------------------------------


async def eof(reply: Reply, fault: Fault, chunks: Chunks) -> bool:
    """A clean end, without finish chunk or [DONE]: kill -9 of mlx_lm.server looks like this."""
    await reply.end()
    return True


async def reset(reply: Reply, fault: Fault, chunks: Chunks) -> bool:
    reply.reset()
    return True


async def death(reply: Reply, fault: Fault, chunks: Chunks) -> bool:
    """The whole server is gone, as by kill -9, for all that it works for; where it is a process, that ends."""
    reply.kill()
    await reply.silence()
    return True


async def truncate(reply: Reply, fault: Fault, chunks: Chunks) -> bool:
    """kill -9 of a chunked server, in the middle of an event."""
    await reply.truncate(chunks.delta({"content": " never whole"}))
    return True


async def freeze(reply: Reply, fault: Fault, chunks: Chunks) -> bool:
    """No more bytes, and the connection stays open."""
    await reply.silence()
    return True


async def heartbeat_only(reply: Reply, fault: Fault, chunks: Chunks) -> bool:
    """Comments without end."""
    while reply.started and not reply.left:
        await reply.send([b": heartbeat\n\n"])
        await asyncio.sleep(fault.seconds)
    await reply.silence()
    return True


async def error_event(reply: Reply, fault: Fault, chunks: Chunks) -> bool:
    """An error object inside the 200 stream, or the event `body`; then what this server sends after one. Unstreamed, a
    plain error."""
    if not reply.started:
        return await status(reply, fault)
    given = isinstance(fault.body, str)
    await reply.finish([fault.body.encode()] if given else chunks.error(fault.message, fault.code))
    return True


async def early_error(reply: Reply, fault: Fault, chunks: Chunks) -> bool:
    """A chunk with only the role, then the error: no content was committed yet."""
    if reply.started and not chunks.flavour.opening:
        await reply.send([chunks.opening()])
    return await error_event(reply, fault, chunks)


async def garbage(reply: Reply, fault: Fault, chunks: Chunks) -> bool:
    """A data line that is no JSON, and the stream goes on; unstreamed, a body that is none."""
    broken = b'{"choices": [{"delta"'
    if not reply.started:
        await reply.whole(Answer(200, broken))
        return True
    await reply.send([b"data: " + broken + b"\n\n"])
    return False


# --- the writes of some events ----------------------------------------------------------------------------------------


def drip(reply: Reply, events: Sequence[bytes]) -> list[bytes]:
    """Three bytes at a time, through the middle of UTF-8 characters."""
    data = reply.framed(events)
    return [data[at : at + 3] for at in range(0, len(data), 3)]


def split(reply: Reply, events: Sequence[bytes]) -> list[bytes]:
    """Each event in two writes, cut inside its first UTF-8 character of several bytes, if it has one."""
    pieces = []
    for event in events:
        data = reply.framed([event])
        inside = (at for at, byte in enumerate(data) if byte & 0xC0 == 0x80)  # a continuation byte
        cut = next(inside, len(data) // 2)
        pieces += [data[:cut], data[cut:]]
    return pieces


def join(reply: Reply, events: Sequence[bytes]) -> list[bytes]:
    """All in one write: the token clock hands over two events at a time."""
    return [reply.framed(events)]


def crlf(reply: Reply, events: Sequence[bytes]) -> list[bytes]:
    return [reply.framed([event.replace(b"\n", b"\r\n") for event in events])]


def cr(reply: Reply, events: Sequence[bytes]) -> list[bytes]:
    return [reply.framed([event.replace(b"\n", b"\r") for event in events])]


ANSWERS: Mapping[str, Callable[[Reply, Fault], Awaitable[bool]]] = {
    function.__name__: function
    for function in (empty_reply, empty_body, slow_headers, status, unstreamed, gzip, flood, thread_death)
}
INTERRUPTIONS: Mapping[str, Callable[[Reply, Fault, Chunks], Awaitable[bool]]] = {
    function.__name__: function
    for function in (eof, reset, death, truncate, freeze, heartbeat_only, error_event, early_error, garbage)
}
WRITES: Mapping[str, Callable[[Reply, Sequence[bytes]], list[bytes]]] = {
    function.__name__: function for function in (drip, split, join, crlf, cr)
}
TABLES: tuple[Mapping[str, object], ...] = (ANSWERS, INTERRUPTIONS, ENDINGS, WRITES, EVENTS, VECTORS)
