"""The frames of an answer on their way to one reader."""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque

from fleet_worker.protocol.reply import Deltas, Frame
from fleet_worker.router.wakeups import Wakeups, wake_tasks


class ReplyBuffer:
    """A bounded queue. Any thread puts, one at a time; its reader, a thread or an asyncio task, gets."""

    def __init__(self, wakeups: Wakeups, *, deadline: float, max_buffered: int) -> None:
        self.deadline = deadline
        self.closed = False
        self.task: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        """The event loop of its reader, and what wakes it there; None while no asyncio task has read."""
        self._wakeups = wakeups
        self._max_buffered = max_buffered
        self._put = self._got = 0
        """Deltas. Each of the two is changed by one thread at a time."""
        self._frames: deque[Frame | None] = deque()
        """None: it was closed."""
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, frame: Frame) -> bool:
        """Append a frame. Return False instead if it has deltas and too many wait already."""
        if isinstance(frame, Deltas):
            if self._put - self._got >= self._max_buffered:
                return False
            self._put += len(frame.deltas)
        self._frames.append(frame)
        self._wakeups.wake(self)
        return True

    def wake(self) -> None:
        """Let a reader that waits look again."""
        if self.task:
            wake_tasks(*self.task)
        elif self._bell.empty():
            self._bell.put(None)

    def get(self) -> Frame:
        """Return the next frame; raises `queue.Empty` at the deadline, or when it is closed."""
        while not self._frames:
            self._bell.get(timeout=max(0.0, self.deadline - time.monotonic()))
        return self._read()

    async def aget(self) -> Frame:
        """As `get`, for an asyncio task. One timer serves all waits: one for each costs more than the frame."""
        if self.task is None:
            loop, arrived = asyncio.get_running_loop(), asyncio.Event()
            self.task, self._timer = (loop, arrived), loop.call_at(self.deadline, arrived.set)
        _, arrived = self.task
        while not self._frames:
            if time.monotonic() >= self.deadline:
                raise queue.Empty
            await arrived.wait()
            arrived.clear()
        return self._read()

    def get_deltas(self) -> Deltas | None:
        """Return the next frame if it is there already and has deltas."""
        frame = self._frames[0] if self._frames else None
        if isinstance(frame, Deltas):
            self._read()
            return frame
        return None

    def close(self) -> None:
        """End it: a reader that waits in `get` or `aget` gets `queue.Empty`."""
        self.closed = True
        self._frames.append(None)
        self.wake()
        if self._timer:
            self._timer.cancel()

    def _read(self) -> Frame:
        frame = self._frames.popleft()
        if frame is None:
            raise queue.Empty
        if isinstance(frame, Deltas):
            self._got += len(frame.deltas)
        return frame
