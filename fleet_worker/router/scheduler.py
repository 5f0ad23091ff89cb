"""What a router has to do soon, or later, without anybody waiting for it: one thread does all of it."""

from __future__ import annotations

import contextlib
import logging
import queue
import sched
import threading
import time
from collections.abc import Callable

from fleet_worker.errors import where

log = logging.getLogger(__name__)

NEVER = float("inf")


class Scheduler:
    """Calls functions at their moment (monotonic seconds), one after the other. They should not take long."""

    def __init__(self) -> None:
        self._schedule = sched.scheduler(time.monotonic)
        self._changed: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Not an Event, which is not reentrant: the garbage collector may put something on the agenda at any moment."""
        self._sleeps_until = NEVER
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fleet-agenda", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def at(self, moment: float, do: Callable[[], object]) -> None:
        self._schedule.enterabs(moment, 0, do)
        if moment < self._sleeps_until:
            self._changed.put(None)

    def soon(self, do: Callable[[], object]) -> None:
        self.at(time.monotonic(), do)

    def close(self, timeout: float = 5.0) -> None:
        """Do what is due, and no more."""
        self._closed = True
        self._changed.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            self._sleeps_until = NEVER  # what comes from now on wakes the thread, until it knows better
            closed = self._closed
            left = self._do_what_is_due()
            if closed:
                return
            self._sleeps_until = NEVER if left is None else time.monotonic() + left
            self._sleep(left)

    def _sleep(self, seconds: float | None) -> None:
        with contextlib.suppress(queue.Empty):
            self._changed.get(timeout=seconds)
            while True:
                self._changed.get_nowait()

    def _do_what_is_due(self) -> float | None:
        """Return the seconds until the next is due."""
        while True:
            try:
                return self._schedule.run(blocking=False)
            except Exception as error:  # the schedule has forgotten it already
                log.error("a router could not do what was due: %s at %s", type(error).__name__, where(error))
