"""The readers of one request: threads and asyncio tasks, each of which gets the whole answer."""

from __future__ import annotations

import time

from fleet_worker.protocol.reply import Deltas, Frame
from fleet_worker.router.reply_buffer import ReplyBuffer
from fleet_worker.router.wakeups import Wakeups


class Readers:
    """For use under the lock of the request, except `any_left`."""

    def __init__(self, wakeups: Wakeups, max_buffered: int) -> None:
        self._wakeups = wakeups
        self._max_buffered = max_buffered
        self._buffers: list[ReplyBuffer] = []

    @property
    def any_left(self) -> bool:
        return bool(self._buffers)

    def join(self, timeout: float, past: Deltas | None, last: Frame | None) -> ReplyBuffer:
        """Return the buffer of one more reader, who waits at most `timeout` seconds. It begins with what was delivered
        so far; with the `last` frame it is complete."""
        room = self._max_buffered + (len(past.deltas) if past else 0)
        buffer = ReplyBuffer(self._wakeups, deadline=time.monotonic() + timeout, max_buffered=room)
        if past:
            buffer.put(past)
        if last:
            buffer.put(last)
        else:
            self._buffers.append(buffer)
        return buffer

    def deliver(self, frame: Frame) -> list[ReplyBuffer]:
        """Give a frame to all; return the buffers that have no room for it."""
        return [buffer for buffer in self._buffers if not buffer.put(frame)]

    def drop_closed(self) -> bool:
        """Remove those whose buffers are closed. Return whether that were the last ones."""
        had_readers = bool(self._buffers)
        self._buffers = [buffer for buffer in self._buffers if not buffer.closed]
        return had_readers and not self._buffers

    def end(self) -> None:
        """Remove all: the answer is complete."""
        self._buffers = []
