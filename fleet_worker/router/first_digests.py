"""The first digests that a router hears: until all hosts have told, requests with a long prompt may wait for them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

ANSWERED_WITHIN = 1.1
"""Seconds after the first request for digests, after which no host is waited for: each publishes one a second."""


class FirstDigests:
    """`hosts` returns how many hosts are known. Only `wait` and `end` are for any thread."""

    def __init__(self, hosts: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._hosts = hosts
        self._clock = clock
        self._heard: set[str] = set()
        """The hosts that have told."""
        self._due_at = math.inf
        self._is_over = threading.Event()

    @property
    def is_over(self) -> bool:
        return self._is_over.is_set()

    def wait(self, timeout: float) -> bool:
        """Wait until all known hosts have told, or some took too long; return False after `timeout` seconds."""
        return self._is_over.wait(timeout)

    def asked(self) -> None:
        """Digests were asked for: from the first time on, hosts have `ANSWERED_WITHIN` seconds."""
        self._due_at = min(self._due_at, self._clock() + ANSWERED_WITHIN)

    def heard(self, host: str) -> None:
        self._heard.add(host)

    def check(self) -> None:
        """End it if all known hosts have answered, or their time is over."""
        have_all_told = self._due_at < math.inf and 0 < self._hosts() <= len(self._heard)
        if have_all_told or self._clock() >= self._due_at:
            self.end()

    def end(self) -> None:
        """Nobody waits any longer."""
        self._is_over.set()
