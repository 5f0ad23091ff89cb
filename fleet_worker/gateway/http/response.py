"""The answer to one HTTP request, written whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from fleet_worker.gateway.http.request import ClientLeft
from fleet_worker.gateway.problems import Problem

Send = Callable[[dict[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON: bytes = b"application/json"
ALWAYS: tuple[Header, ...] = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
)
"""On every answer: no proxy keeps it, or holds it back."""
REQUEST_ID = (b"x-request-id", b"request-id")
"""Where the SDKs of OpenAI and of Anthropic read the id of a request."""


class Connection(Protocol):
    """What an answer knows of its connection."""

    @property
    def is_write_paused(self) -> bool:
        """Whether the client reads more slowly than it is written to."""

    def abort(self) -> None:
        """Close it at once, whatever is still to be written."""


def always(request_id: str) -> list[Header]:
    """Return the headers that every answer has."""
    return [(name, request_id.encode("ascii")) for name in REQUEST_ID] + [*ALWAYS]


class Response:
    """One answer. A client that reads nothing for `write_timeout` seconds is disconnected.

    All methods raise `ClientLeft` if the client is gone.
    """

    def __init__(self, scope: dict[str, Any], send: Send, request_id: str, write_timeout: float) -> None:
        self._send = send
        self._connection: Connection = scope["extensions"]["fleet"]
        self._always = always(request_id)
        self._write_timeout = write_timeout
        self.status: int | None = None
        """None before it has begun."""
        self.late_error: Callable[[Problem], bytes] | None = None
        """Makes the error that ends a stream which has begun."""

    async def whole(self, status: int, body: bytes, headers: Iterable[Header] = (), media_type: bytes = JSON) -> None:
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, [(b"content-type", media_type), length, *headers])
        await self._body(body, more=False)

    async def begin(self, headers: Iterable[Header], media_type: bytes) -> None:
        """Begin a stream, with status 200."""
        await self._start(200, [(b"content-type", media_type), *headers])

    def write(self, data: bytes) -> Awaitable[None]:
        return self._body(data, more=True)

    async def end(self, data: bytes) -> None:
        """Write the last bytes of a stream, in one write with its end."""
        await self._body(data, more=False)

    async def fail(self, problem: Problem) -> None:
        """End an answer that has begun."""
        if self.late_error:
            await self.end(self.late_error(problem))
        else:  # a whole answer is on its way: an error cannot follow it
            self.break_off()

    @property
    def is_paused(self) -> bool:
        """Whether the client reads more slowly than it is written to."""
        return self._connection.is_write_paused

    def break_off(self) -> None:
        """Close the connection, whatever is still to be written."""
        self._connection.abort()

    def _start(self, status: int, headers: list[Header]) -> Awaitable[None]:
        self.status = status
        return self._sent({"type": "http.response.start", "status": status, "headers": [*self._always, *headers]})

    def _body(self, data: bytes, *, more: bool) -> Awaitable[None]:
        return self._sent({"type": "http.response.body", "body": data, "more_body": more})

    def _sent(self, message: dict[str, Any]) -> Awaitable[None]:
        # A timeout for each token would cost more than all else here.
        return self._sent_in_time(message) if self._connection.is_write_paused else self._send(message)

    async def _sent_in_time(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await self._send(message)
        except TimeoutError:
            self.break_off()
            raise ClientLeft from None
