"""The stream of one answer: it begins with the first deltas, and never stays silent for long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from fleet_worker.gateway.dialect import Writer
from fleet_worker.gateway.request import ClientLeft
from fleet_worker.gateway.response import Header, Response
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
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._written_at = asyncio.get_running_loop().time()
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._beating.cancel()

    async def write(self, deltas: list[Delta]) -> None:
        await self._write(lambda: self._writer.deltas(deltas))

    async def end(self, response: ChatResponse) -> None:
        async with self._writing:
            await self._response.end(await self._opened(lambda: self._writer.end(response)))

    async def _write(self, made: Callable[[], bytes]) -> None:
        async with self._writing:
            if data := await self._opened(made):
                await self._response.write(data)
                self._written_at = asyncio.get_running_loop().time()

    async def _opened(self, made: Callable[[], bytes]) -> bytes:
        """Begin the stream if it has not begun, and return what has to come first, and then what is `made`."""
        if self._begun:
            return made()
        self._begun = True
        self._response.failed = self._writer.failed
        await self._response.begin(self._headers(), self._writer.media_type)
        return self._writer.begin() + made()

    async def _beat(self) -> None:
        with contextlib.suppress(ClientLeft):
            while True:
                silent_for = asyncio.get_running_loop().time() - self._written_at
                await asyncio.sleep(self._heartbeat - silent_for if silent_for < self._heartbeat else 0)
                if silent_for >= self._heartbeat:
                    await self._write(lambda: self._writer.heartbeat)
