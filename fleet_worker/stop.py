"""Ends a request to an MLX server from outside, while another thread waits for its answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleet_worker.errors import FleetError

__all__ = ["Stop"]


class Stop:
    """One for each request. Who works on it looks at `error`, and says meanwhile how its waiting can be cut short."""

    def __init__(self) -> None:
        self.error: FleetError | None = None
        """Why it was stopped; None while it was not."""
        self._lock = threading.Lock()
        self._cut: Callable[[], object] = lambda: None

    def now(self, error: FleetError) -> None:
        """Stop it, from any thread; only the first reason counts."""
        with self._lock:
            if self.error is None:
                self.error = error
                self._cut()

    @contextmanager
    def cutting(self, cut: Callable[[], object]) -> Iterator[None]:
        """Within this block `cut` is what ends a wait: called once, in the thread of whoever stops. It must
        not block.

        Raises:
            FleetError: it has been stopped before the block began; `cut` is not called then.
        """
        with self._lock:
            if self.error is not None:
                raise self.error
            self._cut = cut
        try:
            yield
        finally:
            with self._lock:
                self._cut = lambda: None
