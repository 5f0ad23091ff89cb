"""The stream of one answer: it begins with the first deltas, and never stays silent for long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from fleet_worker.gateway.dialects.dialect import Writer
from fleet_worker.gateway.http.request import ClientLeft
from fleet_worker.gateway.http.response import Header, Response
from fleet_worker.protocol.reply import ChatResponse, Delta


class EventStream:
    """Writes what `writer` makes of deltas. After each `heartbeat` seconds of silence it writes a heartbeat.

    `headers` is called when it begins: then they are final. Use it with `async with`.
    """

    def __init__(
        self, response: Response, writer: Writer, headers: Callable[[], Iterable[Header]], heartbeat: float
    ) -> None:
        self._response = response
        self._writer = writer
        self._headers = headers
        self._heartbeat = heartbeat
        self._begun = False
        self._written_at = 0.0
        self._beginning = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._written_at = self._loop.time()
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._beating.cancel()

    async def write(self, deltas: list[Delta]) -> None:
        first = b"" if self._begun else await self._begin()
        if data := first + self._writer.deltas(deltas):
            self._written_at = self._loop.time()
            await self._response.write(data)

    async def end(self, response: ChatResponse) -> None:
        first = await self._begin()
        await self._response.end(first + self._writer.end(response))

    async def _begin(self) -> bytes:
        """Begin the stream, unless it has begun already. Return what has to be written first."""
        async with self._beginning:
            if self._begun:
                return b""
            self._response.late_error = self._writer.failed
            await self._response.begin(self._headers(), self._writer.media_type)
            self._begun = True
            return self._writer.begin()

    async def _beat(self) -> None:
        with contextlib.suppress(ClientLeft):
            while True:
                silent_for = self._loop.time() - self._written_at
                await asyncio.sleep(self._heartbeat - silent_for if silent_for < self._heartbeat else 0)
                if silent_for >= self._heartbeat:
                    await self._write_heartbeat()

    async def _write_heartbeat(self) -> None:
        self._written_at = self._loop.time()
        if not self._response.is_paused:  # else there is something to read anyway
            first = await self._begin()
            await self._response.write(first + self._writer.heartbeat)
