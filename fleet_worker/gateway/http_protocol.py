"""The HTTP of uvicorn with bounds: on the head of a request, on the time for it, and on the number of connections."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fleet_worker.gateway.json_text import compact
from fleet_worker.gateway.openai_chat import error_object
from fleet_worker.gateway.problems import Problem

MOST_HEADERS = 128
MOST_HEAD_BYTES = 64 * 1024
"""Bytes of the path and all headers."""
HEAD_WITHIN = 15.0
"""Seconds from the first byte of a request to the end of its headers."""
ASK_SILENT_CLIENT_AFTER = 30
"""Seconds of silence after which TCP asks whether the client is still there."""

_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}
_INVALID = Problem(status=400, code="invalid_http", message="this is no valid HTTP request")
_SLOW = Problem(status=408, code="timeout", message=f"the headers did not arrive within {HEAD_WITHIN:g} s")
_TOO_LARGE = Problem(
    status=431,
    code="headers_too_large",
    message=f"the headers are larger than {MOST_HEAD_BYTES:,} bytes, or more than {MOST_HEADERS}",
)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Who exceeds a bound is told so and disconnected."""

    max_connections = 10_000

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._problem = _INVALID
        self._head_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > self.max_connections:
            self.transport.abort()
            return
        _ask_silent_clients(transport.get_extra_info("socket"))
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._head_timer and self._head_bytes > MOST_HEAD_BYTES:  # the parser keeps a header that does not end
            self._refuse(_TOO_LARGE)
            return
        self._head_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_WITHIN, self._refuse, _SLOW)
        super().on_message_begin()
        self.scope["extensions"] = {"fleet": {"abort": self.transport.abort}}

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        bytes_so_far = len(self.url) + sum(len(name) + len(value) for name, value in self.headers[-1:])
        if len(self.headers) > MOST_HEADERS or bytes_so_far > MOST_HEAD_BYTES:
            self._problem = _TOO_LARGE
            raise ValueError  # the parser stops, and calls send_400_response

    def on_headers_complete(self) -> None:
        self._head_arrived()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._problem)

    def _refuse(self, problem: Problem) -> None:
        self._head_arrived()
        if self.cycle is None or self.cycle.response_complete:  # else its bytes would come into that answer
            body = compact({"error": error_object(problem)}).encode("ascii")
            head = f"HTTP/1.1 {problem.status} {_REASONS[problem.status]}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _head_arrived(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None


def _ask_silent_clients(connection: Any) -> None:
    """Notice a client that vanished without a word, as a computer that sleeps does."""
    if connection is None or connection.family == getattr(socket, "AF_UNIX", None):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # macOS calls it TCP_KEEPALIVE
    if idle is not None:
        connection.setsockopt(socket.IPPROTO_TCP, idle, ASK_SILENT_CLIENT_AFTER)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
