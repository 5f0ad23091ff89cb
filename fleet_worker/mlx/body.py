"""The body of a response, decoded and never larger than was agreed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import httpx
from pydantic_core import from_json

from fleet_worker.errors import MalformedOutput

_PIECE_BYTES = 64 * 1024
_MOST_CONTAINERS = 100_000
_CONTAINER_BYTES = 3
"""Of the smallest one in a list, with its comma."""
_GZIP_OR_ZLIB = 47
"""`wbits` of zlib: the header says which of the two it is."""


def body_of(response: httpx.Response) -> Iterable[bytes]:
    """Return the body as it arrives. `iter_raw` would be one more generator for every read.

    We ask for `identity`. What is compressed nevertheless, by the server or by a proxy, is decoded in small pieces.

    Raises:
        MalformedOutput: it is compressed in another way than gzip or deflate, or is not what it says.
    """
    received = cast("httpx.SyncByteStream", response.stream)
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return received
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise MalformedOutput("the MLX server compresses its answers in a way that is not known: turn it off")
    return _decompressed(received)


def _decompressed(received: Iterable[bytes]) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(_GZIP_OR_ZLIB)
    for rest in received:
        while rest:
            try:
                piece = decompressor.decompress(rest, _PIECE_BYTES)
            except zlib.error:
                raise MalformedOutput("the MLX server sent something that is not compressed as it says") from None
            rest = decompressor.unconsumed_tail
            if piece:
                yield piece


def read_body(response: httpx.Response, limit: int) -> bytearray:
    """Return the whole body, without the copy that `bytes` would be.

    Raises:
        MalformedOutput: it has more than `limit` bytes, or its encoding is not known.
        httpx.HTTPError: the connection broke.
    """
    content = bytearray()
    for piece in body_of(response):
        content += piece
        if len(content) > limit:
            raise MalformedOutput(f"the MLX server sent a body of more than {limit:,} bytes")
    return content


def json_object(content: bytes | bytearray) -> dict[str, Any] | None:
    """Return this JSON object, or None if it is something else.

    Raises:
        MalformedOutput: it has so many objects that they would fill the memory.
    """
    check_containers(content)
    try:
        parsed = from_json(content)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def check_containers(content: bytes | bytearray) -> None:
    """Refuse JSON with more than 100,000 lists and objects: each takes 3 bytes of it, and 70 in memory.

    Raises:
        MalformedOutput: it has more.
    """
    if len(content) <= _CONTAINER_BYTES * _MOST_CONTAINERS:
        return
    if len(content) - len(content.translate(None, b"{[")) > _MOST_CONTAINERS:  # several times as fast as `count`
        raise MalformedOutput(f"the MLX server sent JSON with more than {_MOST_CONTAINERS:,} lists and objects")
