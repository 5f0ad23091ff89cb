"""Ends a request to an MLX server from outside, while another thread waits for its answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleet_worker.errors import FleetError


class CancelToken:
    """One for each request. Who works on it looks at `error`, and says meanwhile how its waiting can be cut short."""

    def __init__(self) -> None:
        self.error: FleetError | None = None
        """Why it was stopped; None while it was not."""
        self._lock = threading.Lock()
        self._cuts: list[Callable[[], object]] = []

    def now(self, error: FleetError) -> None:
        """Stop it, from any thread; only the first reason counts."""
        with self._lock:
            if self.error is None:
                self.error = error
                for cut in self._cuts:
                    cut()

    @contextmanager
    def cutting(self, cut: Callable[[], object]) -> Iterator[None]:
        """Within this block `cut` is what ends a wait: called once, in the thread of whoever stops. It must
        not block. There may be blocks within blocks, for what is waited for in turn.

        Raises:
            FleetError: it has been stopped before the block began; `cut` is not called then.
        """
        with self._lock:
            if self.error is not None:
                raise self.error
            self._cuts.append(cut)
        try:
            yield
        finally:
            with self._lock:
                self._cuts.remove(cut)
