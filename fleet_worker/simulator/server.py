"""The sockets and routes of a simulated MLX server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Sequence
from typing import Self

from pydantic_core import from_json

from fleet_worker.simulator.answers import Answer, answer
from fleet_worker.simulator.chats import Chat
from fleet_worker.simulator.machine import Engine, Machine, Request
from fleet_worker.simulator.manners import EVENTS, VECTORS
from fleet_worker.simulator.replies import ANSWERS, WRITES, Fault, Reply
from fleet_worker.simulator.texts import embedding, encoded_embedding

TURNS_TO_BEGIN = 5
"""Turns of the event loop from the acceptance of a connection to the first line of `_connection`. A server that is
closed in between forgets the connection without closing it."""


class SimulatedMLX(Machine):
    """A simulated MLX server on 127.0.0.1; it serves from `with` to the end of the block."""

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restart(self) -> None:
        """Listen, on the same port as before, with a living generation thread and the first model loaded."""
        listener = socket.create_server(("127.0.0.1", self.port), backlog=self.backlog)
        self.port = listener.getsockname()[1]
        self.engine = Engine(self)
        listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(listener, listening)), daemon=True)
        self._thread.start()
        listening.wait()

    def kill(self) -> None:
        """Close all sockets at once, the listening one too, as SIGKILL would. Do nothing if it is killed already."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._killed.set)
            self._thread.join()

    def wait_until_killed(self) -> None:
        """Return when the server is killed, by a fault or by another thread."""
        self._thread.join()

    async def _serve(self, listener: socket.socket, listening: threading.Event) -> None:
        self._loop, self._killed = asyncio.get_running_loop(), asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_server(self._connection, sock=listener, backlog=self.backlog)
        listening.set()
        await self._killed.wait()
        self._loop.remove_reader(listener)
        for _ in range(TURNS_TO_BEGIN):
            await asyncio.sleep(0)
        server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        # asyncio does it only for sockets that name their protocol, and `create_server` makes none.
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.count(connections=1, open_connections=1)
        try:
            exchange = await self._exchange(reader, writer)
            while await exchange.run():
                async with asyncio.timeout(self.keep_alive):
                    exchange = await self._exchange(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError):
            pass  # the client left, or was idle for too long, or the server is killed
        finally:
            self._writers.discard(writer)
            self.count(open_connections=-1)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")[:-2]
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = headers.get("content-length", "")
        raw = await reader.readexactly(int(length) if length.isdecimal() else 0)
        if headers.get("transfer-encoding") == "chunked" and not self.behaviour.http10:
            raw = await _chunked_body(reader)
        reply = Reply(reader, writer, self.behaviour, flush_each=self.flush_each)
        reply.kill = self._killed.set
        return Exchange(self, reply, Request(method, path, headers), raw)


async def _chunked_body(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


class Exchange:
    """One request of any kind, and its answer."""

    def __init__(self, machine: Machine, reply: Reply, record: Request, raw: bytes) -> None:
        self.machine, self.flavour = machine, machine.behaviour
        self.reply, self.record, self.raw = reply, record, raw
        self.fault: Fault | None = None

    async def run(self) -> bool:
        """Answer the request; return whether the connection can carry another request."""
        if self.record.path.startswith("/simulated/"):
            await self.reply.whole(self._simulated(), sized=True)
            return not self.reply.closes
        self.machine.begin(self.record)
        self.reply.on_end = self._end
        try:
            await self._answer()
        except ConnectionError:
            if not (self.record.finished or self.record.disconnected):
                self._end()
            raise
        return not self.reply.closes and self.record.headers.get("connection", "").lower() != "close"

    def _end(self) -> None:
        """Record the end of the request, before the client can see the end of the reply."""
        left = self.record.disconnected = self.reply.left
        self.record.finished = not left
        self.machine.count(finished=not left, disconnected=left)

    def _simulated(self) -> Answer:
        """The simulator's own routes, for tests that run it as a process."""
        if self.record.path == "/simulated/requests":
            return answer(200, [{**vars(request), "model": request.model} for request in self.machine.requests])
        if self.record.path == "/simulated/counters":
            return answer(200, self.machine.counters)
        if self.record.path == "/simulated/forget":
            self.machine.forget()
            return answer(200, {})
        try:
            if self.record.path == "/simulated/held":
                self.machine.held_at = from_json(self.raw)["at_token"]
            else:
                faults = from_json(self.raw)
                self.machine.fail(*(Fault(**fault) for fault in (faults if isinstance(faults, list) else [faults])))
        except (KeyError, TypeError, ValueError) as error:
            return answer(400, {"error": str(error)})
        return answer(200, {})

    async def _answer(self) -> None:
        if await self._struck_at_once():
            return None
        route = self.flavour.route(self.record.method, self.record.path)
        if isinstance(route, Answer):
            return await self.reply.whole(route)
        if refusal := self._unauthorized(route) or (self._unreadable() if self.record.method == "POST" else None):
            return await self.reply.whole(refusal)
        answers = {"chat": self._chat, "embed": self._embed, "models": self._models, "health": self._health}
        return await answers[route]()

    async def _struck_at_once(self) -> bool:
        """Take the next planned fault that fits; return whether it has answered the request."""
        fault = self.fault = self.machine.next_fault(self.record.path, self.raw)
        if fault is None:
            return False
        self.record.fault = fault.kind
        if fault.kind in WRITES:
            self.reply.writes, self.reply.pause = WRITES[fault.kind], fault.seconds
        self.reply.manner = EVENTS.get(fault.kind)
        if fault.kind == "thread_death":
            self.machine.engine.die()
        return fault.kind in ANSWERS and await ANSWERS[fault.kind](self.reply, fault)

    def _unauthorized(self, route: str) -> Answer | None:
        given = self.record.headers.get("authorization", "")
        if not self.machine.api_key or route == "health" or given == f"Bearer {self.machine.api_key}":
            return None
        return self.flavour.error(401, "Invalid API key" if given else "API key required")

    def _unreadable(self) -> Answer | None:
        """Parse the body; return an error response if it is not valid."""
        length = self.record.headers.get("content-length")
        if self.flavour.http10 and length is None:
            return self.flavour.error(411, "Content-Length header is required")
        if length is not None and not length.isdecimal():
            return self.flavour.error(400, "Invalid Content-Length header")
        try:
            if self.flavour.http10:
                self.raw.decode()
            self.record.body = from_json(self.raw)
        except UnicodeDecodeError as error:  # mlx_lm.server 0.32 does not expect it
            raise ConnectionAbortedError("the handler has raised") from error
        except ValueError as error:
            return self.flavour.not_json(f"Invalid JSON in request body: {error}")
        fine = isinstance(self.record.body, dict)
        return None if fine else self.flavour.not_json("Request should be a JSON dictionary")

    async def _chat(self) -> None:
        await Chat(self.machine, self.reply, self.record, self.record.body, self.fault).run()

    async def _embed(self) -> None:
        body, flavour = self.record.body, self.flavour
        if refusal := flavour.refuses_texts(self.machine.models, body):
            return await self.reply.whole(refusal)
        await asyncio.sleep(self.machine.ttft)
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        count = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": count, "total_tokens": count} if flavour.embedding_usage else None
        tail = json.dumps({"model": body["model"], "usage": usage}).encode()
        rows = (
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector)
            for index, vector in enumerate(self._vectors(texts))
        )
        return await self.reply.whole(Answer(200, b'{"object":"list","data":[' + b",".join(rows) + b"]," + tail[1:]))

    def _vectors(self, texts: Sequence[str]) -> list[bytes]:
        if self.fault and self.fault.kind in VECTORS:
            vectors = [embedding(text, self.machine.dimensions) for text in texts]
            return [json.dumps(vector).encode() for vector in VECTORS[self.fault.kind](vectors)]
        as_base64 = self.flavour.base64 and self.record.body.get("encoding_format") == "base64"
        return [encoded_embedding(text, self.machine.dimensions, as_base64) for text in texts]

    async def _models(self) -> None:
        names = self.machine.models if self.machine.listed is None else self.machine.listed
        models = [{"id": name, "object": "model", "created": 1_767_225_600} for name in names]
        await self.reply.whole(answer(200, {"object": "list", "data": models}))

    async def _health(self) -> None:
        if self.machine.engine.dead and self.machine.dies_loudly:
            await self.reply.whole(answer(503, {"status": "unavailable"}))
        else:
            await self.reply.whole(answer(200, self.flavour.health(self.machine.models)))
