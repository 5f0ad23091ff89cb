"""A request as HTTP brings it: its head, and its body within bounds."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import zstandard

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.problems import Problem, Refused, refuse
from fleet_worker.protocol import json_values
from fleet_worker.protocol.wire import field_names

Receive = Callable[[], Awaitable[dict[str, Any]]]

SMALL_BODY = 64 * 1024
"""Bytes of a body that are always taken, so that no large ones keep a chat out."""

_USABLE_ID = re.compile(r"(?!.*sk-)[A-Za-z0-9._:-]{1,128}")
"""Ids are logged, and keys, which begin with sk-, must not be."""
_OVERLOADED = Problem(
    status=503,
    code="overloaded",
    message="too many large requests arrive at the same time: try again later",
    retry_after=1.0,
    may_retry=True,
)
_LARGEST_WINDOW = 8 * 1024 * 1024
"""Bytes that zstd may use while it decompresses; its own tools use no more by default."""


class ClientLeft(Exception):
    """The client closed its connection."""


class Connection(Protocol):
    """What a request knows of its connection."""

    @property
    def broken(self) -> Problem | None:
        """Why the rest of a body will not come."""


class BodyMemory:
    """How many bytes of bodies are held while they arrive: of one request, and of all together."""

    def __init__(self, most_bytes: int, most_together: int = 128 * 1024 * 1024) -> None:
        self.most_bytes = most_bytes
        self._most_together = max(most_together, 4 * most_bytes)
        self._held = 0

    def hold(self, before: int, now: int) -> None:
        """Note the size of a body that has grown; raise `Refused` if that is too much."""
        if now > self.most_bytes:
            raise _too_large(self.most_bytes)
        more = max(now, SMALL_BODY) - max(before, SMALL_BODY)
        if self._held + more > self._most_together:
            raise Refused(_OVERLOADED)
        self._held += more

    def release(self, size: int) -> None:
        self._held -= max(size, SMALL_BODY) - SMALL_BODY


class Request:
    """One request. `receive` gives its body, and tells when its client leaves."""

    def __init__(self, scope: dict[str, Any], receive: Receive) -> None:
        self.receive = receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: str = scope.get("query_string", b"").decode("latin-1")
        self.headers: dict[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self._connection: Connection = scope["extensions"]["fleet"]
        self.size = 0
        """Bytes of the body, once it was read."""
        self.id = _request_id(self.headers.get("x-request-id"))

    @property
    def secret(self) -> str | None:
        """The key of the caller, where the clients of each API put it."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return token.strip()
        return self.headers.get("x-api-key") or self.headers.get("api-key")

    async def json(self, memory: BodyMemory, within: float) -> dict[str, Any]:
        """Return the body, a JSON object.

        Raises:
            Refused: it is none, is too large, or did not arrive `within` so many seconds.
            InvalidRequest: it is one that nothing here reads: `parsed` tells why.
            ClientLeft: the client left before all of it had arrived.
        """
        try:
            async with asyncio.timeout(within):
                content = await self._content(memory)
        except TimeoutError:
            raise refuse(408, "timeout", f"the body did not arrive within {within:g} s") from None
        content = decompressed(content, self.headers.get("content-encoding", ""), memory.most_bytes)
        self.size = len(content)
        return parsed(content)

    async def left(self) -> None:
        """Wait until the client leaves."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def _content(self, memory: BodyMemory) -> bytes:
        announced = self.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > memory.most_bytes:
            raise _too_large(memory.most_bytes)
        parts, size = [], 0
        try:
            async for part in self._parts():
                memory.hold(size, size + len(part))
                size += len(part)
                parts.append(part)
            return b"".join(parts)
        finally:
            memory.release(size)

    async def _parts(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            yield message.get("body", b"")
            more = message.get("more_body", False)
            if more and self._connection.broken:
                raise Refused(self._connection.broken)


def decompressed(content: bytes, encoding: str, most_bytes: int) -> bytes:
    """Return the content without its compression: gzip, deflate or zstd. No more than `most_bytes` are made of it."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return content
    if encoding not in _DECOMPRESS:
        raise refuse(415, "unsupported_encoding", f"content-encoding: must be one of {', '.join(_DECOMPRESS)}")
    try:
        text = _DECOMPRESS[encoding](content, most_bytes + 1)
    except (zlib.error, ValueError):
        text_says = f"the body is not {encoding}, as content-encoding says, or is cut off"
        raise refuse(400, "invalid_encoding", text_says) from None
    if len(text) > most_bytes:
        raise _too_large(most_bytes)
    return text


def parsed(content: bytes) -> dict[str, Any]:
    """Return the JSON object in `content`, which is UTF-8.

    Raises:
        Refused: it is none.
        InvalidRequest: it has too many values, is nested too deep, or has half characters.
    """
    if json_values.has_more_values(content, json_values.MOST_VALUES):
        raise InvalidRequest(f"the body has more than {json_values.MOST_VALUES:,} values")
    try:
        body = _decoder.decode(content.decode("utf-8"))
    except RecursionError:
        raise InvalidRequest(f"the body is nested more than {json_values.MOST_LEVELS} levels deep") from None
    except ValueError:
        raise refuse(400, "invalid_json", "the body must be a JSON object, in UTF-8") from None
    if not isinstance(body, dict):
        raise refuse(400, "invalid_json", "the body must be a JSON object")
    json_values.check(body, field_names)
    return body


def _from_zlib(content: bytes, most: int) -> bytes:
    machine = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # it finds out whether that is gzip or deflate
    text = machine.decompress(content, most)
    if len(text) < most and not machine.eof:
        raise ValueError
    return text


def _from_zstd(content: bytes, most: int) -> bytes:
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).stream_reader(content)
        return bytes(reader.read(most))
    except zstandard.ZstdError:
        raise ValueError from None


_DECOMPRESS = {"gzip": _from_zlib, "deflate": _from_zlib, "zstd": _from_zstd}


def _refuse_constant(name: str) -> Any:
    raise ValueError


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would make one for each body


def _request_id(given: str | None) -> str:
    """Return the caller's own id if it can be used in logs and headers, or a new one."""
    return given if given and _USABLE_ID.fullmatch(given) else str(uuid.uuid4())


def _too_large(most_bytes: int) -> Refused:
    return refuse(413, "request_too_large", f"the body is larger than {most_bytes:,} bytes (max_body_bytes)")
