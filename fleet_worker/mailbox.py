"""The frames of one request on their way from the inbox to whoever reads the reply."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import time
from collections.abc import Callable

from fleet_worker.errors import FleetError, ReplyLost, ReplyOverflow
from fleet_worker.frames import Accepted, Alive, ChatResponse, Deltas, EmbedResponse, Failure, Frame

__all__ = ["Mailbox"]


class Mailbox:
    """Where the frames of one request arrive, in order and once each, for one reader: a thread or an asyncio task."""

    def __init__(self, request_id: str, attempt: int, *, deadline: float, max_buffered: int) -> None:
        self.id = request_id
        self.attempt = attempt
        self.node: str | None = None
        """The node that accepted this attempt; another that has it too (a redelivery) is not listened to."""
        self._deadline = deadline
        self._max_buffered = max_buffered
        self._buffered = 0
        self._next_seq = 0
        self._ended = False
        self._frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._wake: Callable[[], object] | None = None
        self._arrived: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None

    def put(self, node: str, frame: Frame) -> None:
        """Called by the inbox thread only. Repeats are dropped; a gap ends the reply with `ReplyLost`."""
        if self._ended or frame.attempt != self.attempt or self.node not in (None, node):
            return
        if frame.seq > self._next_seq:
            self._fail(ReplyLost(f"frame {self._next_seq} of the reply never arrived", retryable=True))
            return
        if frame.seq < self._next_seq or isinstance(frame, Alive):
            return
        self.node = node
        self._next_seq += 1
        self._ended = isinstance(frame, ChatResponse | EmbedResponse | Failure)
        self._buffered += len(frame.deltas) if isinstance(frame, Deltas) else 0
        if self._buffered > self._max_buffered and not self._ended:
            self._fail(ReplyOverflow(f"{self._buffered} deltas wait for a reader (router.max_buffered)"))
        else:
            self._deliver(frame)

    def get(self) -> Frame:
        """Return the next frame; raises `queue.Empty` at the deadline."""
        return self._read(self._frames.get(timeout=max(0.0, self._deadline - time.monotonic())))

    async def aget(self) -> Frame:
        """As `get`, for an asyncio task. One timer serves all waits: one for each would cost more than the frame."""
        if self._arrived is None:
            self._arrived, loop = asyncio.Event(), asyncio.get_running_loop()
            self._wake = functools.partial(loop.call_soon_threadsafe, self._arrived.set)
            self._timer = loop.call_at(self._deadline, self._arrived.set)
        while self._frames.empty():
            if time.monotonic() >= self._deadline:
                raise queue.Empty
            await self._arrived.wait()
            self._arrived.clear()
        return self._read(self._frames.get_nowait())

    def close(self) -> None:
        """Let nothing more arrive."""
        self._ended = True
        if self._timer:
            self._timer.cancel()

    def _read(self, frame: Frame) -> Frame:
        if isinstance(frame, Deltas):
            self._buffered -= len(frame.deltas)
        elif not isinstance(frame, Accepted):
            self.close()
        return frame

    def _fail(self, error: FleetError) -> None:
        self._ended = True
        self._deliver(
            Failure(
                id=self.id,
                attempt=self.attempt,
                seq=self._next_seq,
                code=error.code,
                message=error.message,
                error_class=type(error).__name__,
                retryable=error.retryable,
                metadata=error.metadata,
            )
        )

    def _deliver(self, frame: Frame) -> None:
        self._frames.put(frame)
        if wake := self._wake:
            with contextlib.suppress(RuntimeError):  # the event loop of its reader is closed
                wake()
