"""The HTTP of uvicorn with bounds: on the head of a request, on the time for it, on what surrounds its body, and on the
number of connections. What is ambiguous is refused: a proxy may have understood it in another way."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Any, NoReturn

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fleet_worker.gateway.http.http_refusals import (
    CODING,
    HEAD_WITHIN,
    HOST,
    INVALID,
    MOST_HEAD_BYTES,
    MOST_HEADERS,
    MOST_PIPELINED,
    PIPELINED,
    SLOW,
    TOO_LARGE,
    VERSION,
    answer,
)
from fleet_worker.gateway.http.silent_clients import ask_silent_client
from fleet_worker.gateway.problems import Problem

access = logging.getLogger("fleet_worker.gateway.access")

REST_WITHIN = 10.0
"""Seconds that a client has to send the rest of a body that nobody needs, so that it can use the connection again."""
LAST_WORDS_WITHIN = 2.0
"""Seconds that a client has to read why it is disconnected."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A client that exceeds a bound is told so and disconnected.

    An application finds it as `fleet` in `scope["extensions"]`.
    """

    max_connections = 10_000
    write_timeout = 60.0
    """Seconds that a client may leave the last bytes unread."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.access_log = False  # the gateway has its own, without what clients write
        self.broken: Problem | None = None
        """Why nothing more is read from this client."""
        self._problem = INVALID
        self._in_head = False
        self._head_bytes = self._surplus = 0
        self._answering: RequestResponseCycle | None = None
        if len(self.connections) > self.max_connections:
            self.abort()
            return
        ask_silent_client(transport.get_extra_info("socket"))
        self._limit(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    @property
    def is_write_paused(self) -> bool:
        """Whether the client reads more slowly than it is written to."""
        return self.flow.write_paused

    def abort(self) -> None:
        """Close the connection at once, whatever is still to be written."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        if (answering := self._answering) and not answering.response_complete:  # uvicorn tells only the last one
            answering.disconnected = True
            answering.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._surplus > MOST_HEAD_BYTES and not self.broken:  # a header or an extension that does not end
            self._refuse(TOO_LARGE)
        self._surplus += len(data)
        while data and not self.broken and not self.transport.is_closing():
            data = self._feed(data)

    def _feed(self, data: bytes) -> bytes:
        """Parse data. Return what is to be parsed next: the same request without its upgrade."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._problem)
        return b""

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Return the request again without the header `upgrade`, before the rest. The parser takes no body for one that
        has it, and the HTTP client of Java always asks for HTTP/2 in this way."""
        version = self.parser.get_http_version().encode("ascii")
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        return b"".join([*head, b"\r\n", rest])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"fleet": self}  # type: ignore[dict-item]
        self._in_head, self._head_bytes, self._surplus = True, 0, 0
        self._limit(HEAD_WITHIN, self._refuse, SLOW)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes after a body must not look as if a proxy had let it pass
            super().on_header(name, value)
            self._count(len(name) + len(value))

    def _count(self, head_bytes: int) -> None:
        self._head_bytes += head_bytes
        if self._head_bytes > MOST_HEAD_BYTES or len(self.headers) > MOST_HEADERS:
            self._give_up(TOO_LARGE)

    def on_headers_complete(self) -> None:
        self._check_head()
        if self.parser.should_upgrade():  # it comes again, without
            return
        self._in_head = False
        self._limit(None)
        super().on_headers_complete()
        if len(self.pipeline) > MOST_PIPELINED:
            self._give_up(PIPELINED)
        self.flow.resume_reading()  # else it is not seen that the client leaves

    def _check_head(self) -> None:
        version, method = self.parser.get_http_version(), self.parser.get_method()
        hosts = [value for name, value in self.headers if name == b"host"]
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if version not in ("1.1", "1.0"):
            self._give_up(VERSION)
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            self._give_up(HOST)
        if codings not in ([], [b"chunked"]):
            self._give_up(CODING)
        if method == b"CONNECT":
            self._give_up(INVALID)

    def on_body(self, body: bytes) -> None:
        self._surplus -= 2 * len(body)
        super().on_body(body)
        if self.cycle is not self._answering and len(self.cycle.body) > HIGH_WATER_LIMIT:
            self._give_up(PIPELINED)

    def on_message_complete(self) -> None:
        if self._in_head:
            return
        super().on_message_complete()
        if self.cycle.response_complete:  # it was answered before all of it had arrived
            self.cycle.more_body = False
            self._limit(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        answered = self._answering
        super().on_response_complete()  # which answers the next one, or waits for it as long as an idle client may
        if self.transport.is_closing():
            self._limit(self.write_timeout, self.abort)
        elif self.broken:
            self._say_goodbye()
        elif self._in_head:
            self._limit(HEAD_WITHIN, self._refuse, SLOW)
        elif answered is self._answering and answered and answered.more_body:
            self._limit(REST_WITHIN, self._close)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        if cycle.waiting_for_100_continue or cycle.scope["http_version"] == "1.0":
            app = _with_plain_end(cycle, app)
        super()._start_asgi_task(cycle, app)

    def _give_up(self, problem: Problem) -> NoReturn:
        """Stop the parser: then `data_received` refuses the request."""
        self._problem = problem
        raise ValueError

    def _refuse(self, problem: Problem) -> None:
        """Read nothing more. A request that was complete still gets its answer."""
        self.broken = problem
        self._limit(None)
        self.pipeline.clear()
        if self._answering and not self._answering.response_complete:
            self._answering.message_event.set()
            return
        request_id = str(uuid.uuid4())
        access.info("- - %s error=%s id=%s", problem.status, problem.code, request_id)
        self.transport.write(answer(problem, request_id))
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Close the connection in `LAST_WORDS_WITHIN`. Closed at once, it would be reset by what still arrives, and the
        client could lose its answer.
        """
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._limit(LAST_WORDS_WITHIN, self.abort)

    def _close(self) -> None:
        self.transport.close()
        self._limit(self.write_timeout, self.abort)

    def _limit(self, seconds: float | None, end: Callable[..., None] | None = None, *arguments: object) -> None:
        """Call `end` in so many seconds, instead of what was to be called before."""
        self._unset_keepalive_if_required()
        if seconds is not None and end:
            self.timeout_keep_alive_task = self.loop.call_later(seconds, end, *arguments)


def _with_plain_end(cycle: RequestResponseCycle, app: Any) -> Any:
    """Return the application with answers that end with the connection.

    A client of HTTP/1.0 knows no chunks. One that still asks whether it shall send its body may then send it, or not.
    """
    is_old = cycle.scope["http_version"] == "1.0"

    async def call(scope: Any, receive: Any, send: Any) -> None:
        async def send_plainly(message: Any) -> None:
            if message["type"] == "http.response.start":
                cycle.keep_alive = cycle.keep_alive and not cycle.waiting_for_100_continue
                cycle.chunked_encoding = False if is_old else None
            elif is_old:
                cycle.expected_content_length = len(message["body"])
            await send(message)

        await app(scope, receive, send_plainly)

    return call
