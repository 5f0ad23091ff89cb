"""A client that leaves before it has its answer: its request is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fleet_worker.gateway.http.request import ClientLeft, Request


@contextlib.asynccontextmanager
async def while_client_stays(request: Request) -> AsyncIterator[None]:
    """Cancel what is inside when the client leaves: then this raises `ClientLeft`. The body must have been read."""
    inside, left = True, False
    task = asyncio.current_task()

    def leave(watch: asyncio.Task[None]) -> None:
        nonlocal left
        if task and inside and not watch.cancelled():
            left = True
            task.cancel()

    watch = asyncio.create_task(request.left())
    watch.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if not left or not task or task.uncancel():  # another one has cancelled it, too
            raise
        raise ClientLeft from None
    finally:
        inside = False
        watch.cancel()
