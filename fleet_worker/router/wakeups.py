"""When readers are woken: at once, or together after all messages of a batch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol


class Sleeper(Protocol):
    """A reader that may be waiting; `task` is None for one that waits in a thread."""

    task: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None

    def wake(self) -> None: ...


class Wakeups:
    """Wakes readers. What one thread does inside of `together` wakes each of them once, at the end, and each event loop
    once for all of its tasks: a wake-up costs more than a frame."""

    def __init__(self) -> None:
        self._thread: int | None = None
        """The thread that is inside."""
        self._later: dict[Sleeper, None] = {}

    def wake(self, sleeper: Sleeper) -> None:
        """Wake a reader. From any thread."""
        if threading.get_ident() == self._thread:
            self._later[sleeper] = None
        else:
            sleeper.wake()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """For one thread at a time."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
            self._wake_all()

    def _wake_all(self) -> None:
        later, self._later = self._later, {}
        tasks: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        for sleeper in later:
            if sleeper.task:
                loop, arrived = sleeper.task
                tasks.setdefault(loop, []).append(arrived)
            else:
                sleeper.wake()
        for loop, arrived_there in tasks.items():
            wake_tasks(loop, *arrived_there)


def wake_tasks(loop: asyncio.AbstractEventLoop, *arrived: asyncio.Event) -> None:
    """Set these events of an event loop, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_set, arrived)


def _set(arrived: tuple[asyncio.Event, ...]) -> None:
    for event in arrived:
        event.set()
