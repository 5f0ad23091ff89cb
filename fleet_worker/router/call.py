"""A request and its answer, as a thread or an asyncio task holds them: submitted on entering, read, left behind on
leaving."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self, cast

from fleet_worker.errors import Cancelled, Expired, FleetError
from fleet_worker.protocol.reply import ChatResponse, Delta, Deltas, EmbedResponse, Failure, Frame, join
from fleet_worker.router.in_flight import InFlightRequest
from fleet_worker.router.reply_buffer import ReplyBuffer

THREAD_ENDS_WITHIN = 0.2
"""Seconds after the deadline in which a thread that sends a request says itself why that was too late."""


class Call:
    """One reader of one flight. Who leaves it, or forgets it, before its end does not want the rest.

    `take_off` is given the monotonic time at which `timeout` seconds are over, counted from the entering; it returns
    the flight, which may be under way already, and the mailbox that this reader has in it.
    """

    def __init__(self, take_off: Callable[[float], tuple[InFlightRequest, ReplyBuffer]], timeout: float) -> None:
        self._take_off = take_off
        self._timeout = timeout
        self._deadline: float | None = None
        self._entering = threading.Lock()
        self._flight: InFlightRequest | None = None
        self._mailbox: ReplyBuffer | None = None
        self._error: FleetError | None = None

    def __enter__(self) -> Self:
        deadline = self._begin()
        if self._mailbox is None:
            with self._entering:
                if self._mailbox is None:
                    self._submit(deadline)
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        left = self._begin() - time.monotonic()
        if self._mailbox is None:
            try:
                async with asyncio.timeout(left + THREAD_ENDS_WITHIN):
                    await asyncio.to_thread(self.__enter__)
            except asyncio.CancelledError:  # but that thread goes on
                self.cancel()
                raise
            except TimeoutError:
                self._error = Expired(
                    f"the request was not sent within its timeout of {self._timeout:g} s: the broker is away, or the "
                    "threads of asyncio.to_thread are all busy"
                )
                self.cancel()
                raise self._error from None
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Want nothing more, from any thread: reading it raises `Cancelled` from now on."""
        self._error = self._error or Cancelled("the request was cancelled by its caller")
        if self._flight and self._mailbox:
            self._flight.leave(self._mailbox)

    def frame(self) -> Frame:
        """Return the next frame of the answer; raises the error that ended it, every time."""
        self._raise_again()
        try:
            return self._content(self._box.get())
        except queue.Empty:
            raise self._late() from None
        except KeyboardInterrupt:
            self.cancel()
            raise

    async def aframe(self) -> Frame:
        self._raise_again()
        try:
            return self._content(await self._box.aget())
        except queue.Empty:
            raise self._late() from None
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _begin(self) -> float:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout
        return self._deadline

    def _submit(self, deadline: float) -> None:
        self._raise_again()
        try:
            self._flight, self._mailbox = self._take_off(deadline)
        except FleetError as error:
            self._error = self._error or error
            raise
        forgotten = weakref.finalize(self, self._flight.leave, self._mailbox)
        forgotten.atexit = False
        if self._error:  # cancelled meanwhile
            self.cancel()

    def result(self) -> ChatResponse | EmbedResponse:
        return cast(ChatResponse | EmbedResponse, self.frame())

    async def aresult(self) -> ChatResponse | EmbedResponse:
        return cast(ChatResponse | EmbedResponse, await self.aframe())

    @property
    def _box(self) -> ReplyBuffer:
        if self._mailbox is None:
            raise RuntimeError("the request was not submitted: use it in a with block, or iterate it")
        return self._mailbox

    def _raise_again(self) -> None:
        if self._error:
            raise self._error

    def _content(self, frame: Frame) -> Frame:
        if self._error is None and isinstance(frame, Failure):
            self._error = frame.error()
        self._raise_again()
        return frame

    def _late(self) -> FleetError:
        if self._error is None and self._flight:
            self._error = self._flight.late(self._timeout)
        self.cancel()
        return cast(FleetError, self._error)


class ChatStream:
    """A streamed answer: iterate it for its deltas; then `response` is the whole, as `Router.chat` returns it.

    Works with `with` and `for`, and with `async with` and `async for`, for one reader. Nothing is sent before it is
    entered or iterated. An error ends it; what arrived before was yielded.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._ready: deque[Delta] = deque()
        self._deltas: list[Delta] = []
        self._response: ChatResponse | None = None

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

    @property
    def response(self) -> ChatResponse:
        """The whole answer, once the stream has ended."""
        if self._response is None:
            raise RuntimeError("the stream has not ended: iterate it to its end first")
        return self._response

    def cancel(self) -> None:
        """Want nothing more, from any thread: the node stops, and reading this raises `Cancelled`."""
        self._call.cancel()

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, Deltas):
            self._deltas += frame.deltas
            self._ready.extend(frame.deltas)
        else:
            self._response = cast(ChatResponse, frame).model_copy(update=join(self._deltas))
