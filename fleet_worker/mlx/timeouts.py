"""Ends a request to an MLX server before its answer is complete: at a timeout, at its deadline, or when cancelled."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleet_worker.errors import FleetError, RequestTimeout
from fleet_worker.settings import ServerTimeouts

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing resets the connection. Otherwise the server's next write would still succeed, which is one whole
prefill step later, and only the write after that would fail."""


class CancelToken:
    """Cancels one request. The thread that works on it reads `error`, or registers what ends its waiting."""

    def __init__(self) -> None:
        self.error: FleetError | None = None
        """Why the request was cancelled; None until then."""
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []

    def cancel(self, error: FleetError) -> None:
        """Cancel the request, from any thread. Only the first call counts."""
        with self._lock:
            if self.error is None:
                self.error = error
                for callback in self._callbacks:
                    callback()

    @contextmanager
    def on_cancel(self, callback: Callable[[], object]) -> Iterator[None]:
        """Within the block, `cancel` calls `callback` once, in its own thread. It must not block. Blocks may be nested.

        Raises:
            FleetError: the request was cancelled before the block began; `callback` is not called then.
        """
        with self._lock:
            if self.error is not None:
                raise self.error
            self._callbacks.append(callback)
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)


class ConnectionGuard:
    """The connection of one request, which can be cut from any thread."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.moved: Callable[[float], object] = lambda limit: None
        """Is called with each new limit."""
        self.awaits: str | None = None
        """The path of a request without any content yet: the server may be reading its prompt. None after that."""
        self.model: str | None = None
        """What the server calls the model that the request is for, if it is for one."""
        self.size = 0
        """Bytes of the request."""
        self.was_cut = threading.Event()
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    @property
    def limit(self) -> float:
        """When the connection is cut: time.monotonic() seconds. The reader moves it by assignment."""
        return self._limit

    @limit.setter
    def limit(self, limit: float) -> None:
        self._limit = limit
        self.moved(limit)

    def attach(self, connection: socket.socket) -> None:
        """Guard this connection from now on, in place of an earlier one. Its owner may close it or wrap it in TLS."""
        with self._lock:
            self._release()
            self._connection = connection.dup()
            if self.was_cut.is_set():
                self._shut_down()

    def cut(self) -> None:
        """Cut the connection, and at once any that is attached later. Reads that wait on it return."""
        with self._lock:
            self.was_cut.set()
            self._shut_down()

    def close(self) -> None:
        with self._lock:
            self._release()

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError):  # not connected any more
            if self._connection:
                self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self._connection.shutdown(socket.SHUT_RDWR)

    def _release(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None


class TimeoutThread:
    """One thread that enforces the limits of all requests of a client.

    A thread that waits in `recv` cannot check the time, and httpx fixes its timeouts for a whole response. So the wait
    is ended from outside: `shutdown` of the socket makes `recv` return at once, on Linux and macOS.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._guards: set[ConnectionGuard] = set()
        self._wakes_at = math.inf
        """When the thread checks all limits again: at the earliest of them."""
        self._closed = False
        self.last_content = 0.0
        """When content last arrived for any request: time.monotonic() seconds."""
        self.last_progress = 0.0
        """When the server last told how much of a prompt it has read, or 0. Only some do."""
        self.delivered: dict[str, float] = {}
        """When the first content of a request for this model last arrived, by model."""
        self.last_leftover = -math.inf
        """When a request was last cut: the server may work on it for a moment longer."""
        self._thread = threading.Thread(target=self._run, name="fleet-timeouts", daemon=True)
        self._thread.start()

    @contextmanager
    def watching(self, guard: ConnectionGuard) -> Iterator[None]:
        """Cut this connection if its limit passes within the block."""
        guard.moved = self._wake_by
        with self._changed:
            self._guards.add(guard)
        self._wake_by(guard.limit)
        try:
            yield
        finally:
            with self._changed:
                self._guards.discard(guard)
            if guard.was_cut.is_set() and guard.awaits != "/health":
                self.last_leftover = time.monotonic()
            guard.close()

    @property
    def awaited(self) -> list[ConnectionGuard]:
        """The requests that wait for their first content."""
        with self._changed:
            return [guard for guard in self._guards if guard.awaits]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _wake_by(self, limit: float) -> None:
        if limit < self._wakes_at:
            with self._changed:
                self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                self._wakes_at = math.inf  # a limit that moves from now on is reported
                now = time.monotonic()
                for guard in self._guards:
                    if guard.limit <= now and not guard.was_cut.is_set():
                        guard.cut()
                limits = [guard.limit for guard in self._guards if not guard.was_cut.is_set()]
                self._wakes_at = min(limits, default=math.inf)
                self._changed.wait(min(self._wakes_at - now, threading.TIMEOUT_MAX))


class RequestTimer:
    """The timeouts, the deadline and the cancellation of one request. Times are time.monotonic() seconds."""

    def __init__(
        self,
        thread: TimeoutThread,
        timeouts: ServerTimeouts,
        deadline: float,
        cancel_token: CancelToken | None = None,
        first_content: Callable[[], object] = lambda: None,
    ) -> None:
        """`first_content` is called once, when content has arrived."""
        self.started = time.monotonic()
        self.connect_seconds = min(timeouts.connect, deadline - self.started)
        """Seconds that connecting may take, all tries together."""
        self.guard = ConnectionGuard(min(deadline, self.started + timeouts.first_content))
        self._thread = thread
        self._cancel_token = cancel_token or CancelToken()
        self._gap = timeouts.gap
        self._deadline = deadline
        self._has_content = False
        self._first_content = first_content

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enforce the limits within the block: from before the request connects until its response is closed.

        Raises:
            FleetError: the request was cancelled before, or (`RequestTimeout`) its deadline has passed.
        """
        with self._thread.watching(self.guard), self._cancel_token.on_cancel(self.guard.cut):
            if self.started >= self._deadline:
                raise RequestTimeout("the deadline passed before the MLX server was asked")
            yield

    @property
    def connect_timeout(self) -> float:
        """Seconds that are left for connecting."""
        return max(0.001, self.started + self.connect_seconds - time.monotonic())

    def content_received(self) -> float:
        """Note that content has arrived, and return the time. Until `restart_gap` only the deadline counts: the reader
        may be busy with the content."""
        now = self._thread.last_content = time.monotonic()
        if not self._has_content:
            self._has_content = True
            if self.guard.model is not None:
                self._thread.delivered[self.guard.model] = now
            self._first_content()
        self.guard.awaits = None
        self.guard.limit = self._deadline
        return now

    def progressed(self) -> None:
        """Note that the server has read more of a prompt."""
        self._thread.last_progress = time.monotonic()

    def restart_gap(self) -> None:
        """Restart the inter-token timeout, once the reader has consumed a chunk. Before the first content, the
        `first_content` timeout goes on instead.

        Raises:
            FleetError: the request was cancelled or its deadline passed while the reader was busy: what the connection
                still holds is too late.
        """
        self.check()
        if self._has_content:
            self.guard.limit = min(self._deadline, time.monotonic() + self._gap)

    def limit_rest(self, seconds: float) -> None:
        """Cut the connection after so many seconds: all that matters of the response has arrived."""
        self.guard.limit = min(self._deadline, time.monotonic() + seconds)

    @property
    def cancel_error(self) -> FleetError | None:
        """Why the request was cancelled, or None."""
        return self._cancel_token.error

    @property
    def error(self) -> FleetError | None:
        """Why the connection was cut, or None. A cut looks like a failure, or like the end of a response."""
        return self._cancel_token.error or (self._timeout_error() if self.guard.was_cut.is_set() else None)

    def check(self) -> None:
        """Raise `error` if the connection was cut."""
        if error := self.error:
            raise error

    def _timeout_error(self) -> RequestTimeout:
        """Name the limit that was reached. If it was a timeout of the server, another server may do better."""
        if time.monotonic() >= self._deadline:
            return RequestTimeout("the deadline passed while the MLX server was answering")
        if self._has_content:
            text = f"the MLX server was silent for {self._gap:g} s in the middle of its answer (clocks.gap)"
        else:
            text = "the MLX server sent no content in time (clocks.first_content)"
        return RequestTimeout(text, retryable=True)
