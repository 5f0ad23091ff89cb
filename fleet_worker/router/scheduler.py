"""One thread for all that a router has to do later, or without its caller waiting for it."""

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

BROKER_PATIENCE = 0.5
"""Seconds that a call may wait for the broker: other calls are due too."""
NEVER = float("inf")


class Scheduler:
    """Calls functions at given times (time.monotonic() seconds), one after the other. They should not take long."""

    def __init__(self) -> None:
        self._schedule = sched.scheduler(time.monotonic, lambda seconds: None)  # which never waits: see `_sleep`
        self._changed: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Not an Event, which is not reentrant: the garbage collector may schedule something at any time."""
        self._sleeps_until = NEVER
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fleet-scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def at(self, when: float, call: Callable[[], object]) -> None:
        self._schedule.enterabs(when, 0, call)
        if when < self._sleeps_until:
            self._changed.put(None)

    def soon(self, call: Callable[[], object]) -> None:
        self.at(time.monotonic(), call)

    def close(self, timeout: float = 5.0) -> None:
        """Call what is due now and forget the rest."""
        self._closed = True
        self._changed.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            self._sleeps_until = NEVER  # until the next time is known, whatever is added wakes the thread
            closed = self._closed
            left = self._run_due()
            if closed:
                return
            self._sleeps_until = NEVER if left is None else time.monotonic() + left
            self._sleep(left)

    def _sleep(self, seconds: float | None) -> None:
        with contextlib.suppress(queue.Empty):
            self._changed.get(timeout=seconds)
            while True:
                self._changed.get_nowait()

    def _run_due(self) -> float | None:
        """Return the seconds until the next call is due, None if there is none."""
        while True:
            try:
                return self._schedule.run(blocking=False)
            except Exception as error:  # the schedule has removed that call already
                log.error("a scheduled call of the router failed: %s at %s", type(error).__name__, where(error))
