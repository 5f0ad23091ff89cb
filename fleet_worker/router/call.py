"""A request and its answer as one reader uses them: a thread or an asyncio task."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from typing import Self, cast

from fleet_worker.errors import Cancelled, Expired, FleetError
from fleet_worker.protocol.reply import ChatResponse, Delta, Deltas, Failure, Frame
from fleet_worker.router.in_flight import InFlightRequest
from fleet_worker.router.progress import Progress
from fleet_worker.router.reply_buffer import ReplyBuffer
from fleet_worker.router.transcript import Transcript

THREAD_ENDS_WITHIN = 0.2
"""Seconds after the deadline within which the thread that sends a request reports itself why it is too late."""


class Call:
    """One reader of one request. Entering it submits the request; leaving or forgetting it before its end cancels it.

    `start` is called once, with the deadline (time.monotonic() seconds): `timeout` seconds after the first entering. It
    returns the request, which may be in flight already, and this reader's buffer. It waits for the broker, so for an
    asyncio task it runs in a thread of `threads`, after `refuse`, which raises at once what is certain already.
    """

    def __init__(
        self,
        start: Callable[[float], tuple[InFlightRequest, ReplyBuffer]],
        refuse: Callable[[], None],
        timeout: float,
        threads: Executor,
    ) -> None:
        self._start = start
        self._refuse = refuse
        self._timeout = timeout
        self._threads = threads
        self._deadline: float | None = None
        self._entering = threading.Lock()
        self._request: InFlightRequest | None = None
        self._buffer: ReplyBuffer | None = None
        self._error: FleetError | None = None
        """What ended it; reading it raises this on every call."""
        self._cancelled = False

    def __enter__(self) -> Self:
        deadline = self._begin()
        if self._buffer is None:
            with self._entering:
                if self._buffer is None:
                    self._submit(deadline)
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        left = self._begin() - time.monotonic()
        if self._buffer is None:
            self._refuse_at_once()
            try:
                async with asyncio.timeout(left + THREAD_ENDS_WITHIN):
                    await self._enter_in_a_thread()
            except asyncio.CancelledError:  # the thread goes on until the request is sent
                self.cancel()
                raise
            except TimeoutError:
                self._error = Expired(
                    f"the request was not sent within its timeout of {self._timeout:g} s: the broker is away, or too "
                    "many requests are being sent"
                )
                self.cancel()
                raise self._error from None
        return self

    def _refuse_at_once(self) -> None:
        self.raise_again()
        try:
            self._refuse()
        except FleetError as error:
            self._error = error
            raise

    def _enter_in_a_thread(self) -> asyncio.Future[Self]:
        try:
            return asyncio.get_running_loop().run_in_executor(self._threads, self.__enter__)
        except RuntimeError:  # the threads have ended
            raise RuntimeError("this router is closed") from None

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Cancel, from any thread: from now on reading it raises `Cancelled`."""
        self._cancelled = True
        if self._request and self._buffer:
            self._request.leave(self._buffer)

    def frame(self) -> Frame:
        """Return the next frame of the answer; raises the error that ended it, on every call."""
        self.raise_again()
        try:
            return self._checked(self._entered.get())
        except queue.Empty:
            raise self._timed_out() from None
        except KeyboardInterrupt:
            self.cancel()
            raise

    def deltas(self) -> Deltas | None:
        """Return the next frame if it has deltas and is there already."""
        return None if self._ended_by() else self._entered.get_deltas()

    async def aframe(self) -> Frame:
        """As `frame`, awaitable."""
        self.raise_again()
        try:
            return self._checked(await self._entered.aget())
        except queue.Empty:
            raise self._timed_out() from None
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _begin(self) -> float:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout
        return self._deadline

    def _submit(self, deadline: float) -> None:
        self.raise_again()
        try:
            self._request, self._buffer = self._start(deadline)
        except FleetError as error:
            self._error = self._error or error
            raise
        when_forgotten = weakref.finalize(self, self._request.leave, self._buffer)
        when_forgotten.atexit = False
        if self._cancelled:  # meanwhile
            self.cancel()

    @property
    def progress(self) -> Progress | None:
        """How far the request is; None before it was submitted."""
        return self._request.progress if self._request else None

    @property
    def _entered(self) -> ReplyBuffer:
        if self._buffer is None:
            raise RuntimeError("the request was not submitted: use it in a with block, or iterate it")
        return self._buffer

    def raise_again(self) -> None:
        """Raise the error that ended it, if one did."""
        if error := self._ended_by():
            raise error

    def _ended_by(self) -> FleetError | None:
        if self._cancelled and self._error is None:
            self._error = Cancelled("the request was cancelled by its caller")
        return self._error

    def _checked(self, frame: Frame) -> Frame:
        if isinstance(frame, Failure) and not self._cancelled:
            self._error = self._error or frame.error()
        self.raise_again()
        return frame

    def _timed_out(self) -> FleetError:
        if self._request and not self._cancelled:
            self._error = self._error or self._request.timed_out(self._timeout)
        self.cancel()
        return cast(FleetError, self._ended_by())


class ChatStream:
    """A streamed answer. Iterate it for its deltas; then `response` is the whole answer, as `Router.chat` returns it.

    For one reader: `with` and `for`, or `async with` and `async for`. The request is sent when the stream is entered or
    first iterated. Leaving it before its end cancels the request. An error is raised after all deltas that arrived
    before it.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._ready: deque[Delta] = deque()
        self._transcript = Transcript()
        self._response: ChatResponse | None = None
        self._tokens = 0

    def __enter__(self) -> Self:
        self._call.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._call.__exit__()

    async def __aenter__(self) -> Self:
        await self._call.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._call.__aexit__()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while not self._ready:
            if self._response is not None:
                raise StopIteration
            self._call.__enter__()
            self._take(self._call.frame())
        return self._ready.popleft()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._ready:
            if self._response is not None:
                raise StopAsyncIteration
            await self._call.__aenter__()
            self._take(await self._call.aframe())
        return self._ready.popleft()

    def batches(self) -> Batches:
        """Iterate the deltas in lists: those that have arrived together, for who writes them together.

        With `for` or `async for`, instead of iterating the stream itself.
        """
        return Batches(self)

    def take_ready(self) -> list[Delta]:
        """Return the deltas that have arrived and were not read yet."""
        while self._response is None and (frame := self._call.deltas()):
            self._take(frame)
        ready = list(self._ready)
        self._ready.clear()
        return ready

    @property
    def response(self) -> ChatResponse:
        """The whole answer; raises `RuntimeError` before the stream has ended, and the error of one that failed."""
        if self._response is None:
            self._call.raise_again()
            raise RuntimeError("the stream has not ended: iterate it to its end first")
        return self._response

    @property
    def tokens(self) -> int:
        """About how many tokens were delivered so far, reasoning included. It stays when the stream fails or is
        cancelled; `response.usage` of one that has ended is exact."""
        return self._tokens

    @property
    def progress(self) -> Progress | None:
        """Which node has the request, after how long and how many attempts; None before it was submitted."""
        return self._call.progress

    def cancel(self) -> None:
        """Cancel, from any thread: the node stops, and reading the stream raises `Cancelled`."""
        self._call.cancel()

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, Deltas):
            self._transcript.add(frame.deltas)
            self._tokens = frame.tokens
            self._ready.extend(frame.deltas)
        else:
            self._response = cast(ChatResponse, frame).model_copy(update=self._transcript.whole())


class Batches:
    """The deltas of a stream, in lists of those that have arrived together, none of which is empty."""

    def __init__(self, stream: ChatStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[list[Delta]]:
        return self

    def __next__(self) -> list[Delta]:
        return [next(self._stream), *self._stream.take_ready()]

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self

    async def __anext__(self) -> list[Delta]:
        return [await anext(self._stream), *self._stream.take_ready()]
