"""The frames of an answer on their way to one reader."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import time
from collections.abc import Callable

from fleet_worker.protocol.reply import Deltas, Frame


class ReplyBuffer:
    """A bounded queue. Any thread puts; its reader, a thread or an asyncio task, gets."""

    def __init__(self, *, deadline: float, max_buffered: int) -> None:
        self.deadline = deadline
        self.closed = False
        self._max_buffered = max_buffered
        self._buffered = 0
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        """None: it was closed."""
        self._wake: Callable[[], object] | None = None
        self._arrived: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None

    def put(self, frame: Frame) -> bool:
        """Append a frame. Return False instead if it has deltas and too many wait already."""
        if isinstance(frame, Deltas):
            if self._buffered >= self._max_buffered:
                return False
            self._buffered += len(frame.deltas)
        self._append(frame)
        return True

    def get(self) -> Frame:
        """Return the next frame; raises `queue.Empty` at the deadline, or when it is closed."""
        return self._read(self._frames.get(timeout=max(0.0, self.deadline - time.monotonic())))

    async def aget(self) -> Frame:
        """As `get`, for an asyncio task. One timer serves all waits: one for each costs more than the frame."""
        if self._arrived is None:
            self._arrived, loop = asyncio.Event(), asyncio.get_running_loop()
            self._wake = functools.partial(loop.call_soon_threadsafe, self._arrived.set)
            self._timer = loop.call_at(self.deadline, self._arrived.set)
        while self._frames.empty():
            if time.monotonic() >= self.deadline:
                raise queue.Empty
            await self._arrived.wait()
            self._arrived.clear()
        return self._read(self._frames.get_nowait())

    def close(self) -> None:
        """End it: a reader that waits in `get` or `aget` gets `queue.Empty`."""
        self.closed = True
        self._append(None)
        if self._timer:
            self._timer.cancel()

    def _append(self, frame: Frame | None) -> None:
        self._frames.put(frame)
        if wake := self._wake:
            with contextlib.suppress(RuntimeError):  # the event loop of its reader is closed
                wake()

    def _read(self, frame: Frame | None) -> Frame:
        if frame is None:
            raise queue.Empty
        if isinstance(frame, Deltas):
            self._buffered -= len(frame.deltas)
        return frame
