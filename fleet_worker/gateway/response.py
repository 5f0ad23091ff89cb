"""The answer to one HTTP request, written whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from fleet_worker.gateway.request import ClientLeft

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


class Response:
    """One answer. A client that reads nothing for `write_timeout` seconds is disconnected.

    All methods raise `ClientLeft` if the client is gone.
    """

    def __init__(self, scope: dict[str, Any], send: Send, request_id: str, write_timeout: float) -> None:
        self._send = send
        self._abort: Callable[[], None] = scope.get("extensions", {}).get("fleet", {}).get("abort", lambda: None)
        self._always = [(name, request_id.encode("ascii")) for name in REQUEST_ID] + [*ALWAYS]
        self._write_timeout = write_timeout
        self.status: int | None = None
        """None before it has begun."""

    async def whole(self, status: int, body: bytes, headers: Iterable[Header] = (), media_type: bytes = JSON) -> None:
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, [(b"content-type", media_type), length, *headers])
        await self._body(body, more=False)

    async def begin(self, headers: Iterable[Header], media_type: bytes) -> None:
        """Begin a stream, with status 200."""
        await self._start(200, [(b"content-type", media_type), *headers])

    async def write(self, data: bytes) -> None:
        await self._body(data, more=True)

    async def end(self, data: bytes) -> None:
        """Write the last bytes of a stream, in one write with its end."""
        await self._body(data, more=False)

    def break_off(self) -> None:
        """Close the connection, whatever is still to be written."""
        self._abort()

    async def _start(self, status: int, headers: list[Header]) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*self._always, *headers]})

    async def _body(self, data: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            self.break_off()
            raise ClientLeft from None
