"""The requests that run, and the end of the gateway: what still runs then gets its time, and after it an error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import cast

from fleet_worker.gateway.problems import Problem, Refused

_DRAINING = Problem(
    status=503, code="shutting_down", message="this gateway shuts down", retry_after=1.0, may_retry=True
)


class Running:
    """The requests of one event loop that run."""

    def __init__(self, drain_grace: float) -> None:
        self.drain_grace = drain_grace
        """Seconds that requests have to end by themselves."""
        self.draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def until_the_end(self) -> AsyncIterator[None]:
        """Use it around a request.

        Raises:
            Refused: the gateway ends already, or the request has not ended within `drain_grace`.
        """
        if self.draining:
            raise Refused(_DRAINING)
        task = cast(asyncio.Task[None], asyncio.current_task())
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.draining:
                raise
            task.uncancel()
            raise Refused(_DRAINING) from None
        finally:
            self._tasks.discard(task)

    async def drain(self) -> None:
        """Refuse new requests, and wait until those that run have ended. After `drain_grace` they are ended."""
        self.draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.drain_grace)
        self.end_all()

    def end_all(self) -> None:
        """End all requests that run, each with an error."""
        self.draining = True
        for task in tuple(self._tasks):
            task.cancel()
