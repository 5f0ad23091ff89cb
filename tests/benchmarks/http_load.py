"""A cheap HTTP client for benchmarks: connections that are kept open, and no parsing beyond what is measured."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

_TOKEN = re.compile(rb'"content": ?"[^"]')
_LONGEST_CUT = 13
"""Bytes of a token's beginning that may be at the end of a read."""


@dataclass
class Streamed:
    """One answer as it arrived."""

    began: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """`time.monotonic()` seconds and the number of tokens that came with one read."""
    first: bytes = b""
    """The first read with a token, and a little of what came before it."""

    @property
    def ttft(self) -> float:
        return self.arrivals[0][0] - self.began

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)


class Connection:
    """One connection to a server, for one request after the other."""

    def __init__(self, base_url: str, **headers: str) -> None:
        self._headers = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self._host, self._port = urlsplit(base_url).hostname or "", urlsplit(base_url).port or 80

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def stream(self, path: str, body: dict[str, Any]) -> Streamed:
        """Send a chat that is streamed, in chunks, and read it to its end."""
        streamed = Streamed(time.monotonic())
        await self._send(path, body)
        await self._head()
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await self._reader.read(1 << 18)
            now = time.monotonic()
            if not data:  # as mlx_lm.server ends a stream
                self._writer.close()
                break
            cut = tail[-_LONGEST_CUT:]
            if count := len(_TOKEN.findall(cut + data)) - len(_TOKEN.findall(cut)):
                streamed.first = streamed.first or tail + data
                streamed.arrivals.append((now, count))
            tail = (tail + data)[-64:]
        return streamed

    async def whole(self, path: str, body: dict[str, Any]) -> bytes:
        """Send a request and return the body of its answer, which has a length."""
        status, content = await self.answer(path, body)
        if status != 200:
            raise ConnectionError(f"{status}: {content[:200].decode('latin-1')}")
        return content

    async def answer(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """Send a request and return the status and the body of its answer, which has a length."""
        await self._send(path, body)
        head = await self._head()
        length = re.search(rb"content-length: ?(\d+)", head, re.IGNORECASE)
        if not length:
            raise ConnectionError(head[:200].decode("latin-1"))
        return int(head[9:12]), await self._reader.readexactly(int(length[1]))

    async def _send(self, path: str, body: dict[str, Any]) -> None:
        if self._writer.is_closing():
            await self.__aenter__()
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n{self._headers}"
        self._writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)

    async def _head(self) -> bytes:
        return await self._reader.readuntil(b"\r\n\r\n")
