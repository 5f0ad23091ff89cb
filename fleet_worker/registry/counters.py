"""Counters and histograms of a node since it started, in the form of Prometheus, without any content of requests."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from typing import Any

BOUNDS = {
    "ttft_seconds": (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0),
    "queue_wait_seconds": (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
    "tokens_per_second": (1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 200.0, 500.0),
}
"""Upper bounds of the buckets of each histogram; one more bucket holds what is above the last."""


class Counters:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets = {name: [0] * (len(bounds) + 1) for name, bounds in BOUNDS.items()}
        self._sums = dict.fromkeys(BOUNDS, 0.0)
        self._requests: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._prompt_tokens: Counter[str] = Counter()
        self._cached_tokens: Counter[str] = Counter()
        self.tokens = 0
        """Generated tokens in total."""

    def request(self, operation: str, **measured: float | None) -> None:
        """Count an answered request; `measured` are values for the histograms of these names, None if there is none."""
        with self._lock:
            self._requests[operation] += 1
            for name, value in measured.items():
                if value is not None:
                    self._buckets[name][bisect.bisect_left(BOUNDS[name], value)] += 1
                    self._sums[name] += value

    def generated(self, tokens: int) -> None:
        with self._lock:
            self.tokens += tokens

    def prompt(self, model: str, tokens: int | None, cached: int | None) -> None:
        """Count the prompt of a chat, as far as the server tells its tokens, and which of them it had cached."""
        with self._lock:
            self._prompt_tokens[model] += tokens or 0
            if cached is not None:
                self._cached_tokens[model] += cached

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts in total."""
        with self._lock:
            return self._prompt_tokens.total()

    @property
    def cached_tokens(self) -> int | None:
        """Of these, what servers had cached; None if no answer has told yet."""
        with self._lock:
            return self._cached_tokens.total() if self._cached_tokens else None

    def error(self, code: str) -> None:
        with self._lock:
            self._errors[code] += 1

    def report(self) -> dict[str, Any]:
        """Return `{tokens, prompt_tokens: {model: n}, cached_tokens: {model: n}, requests: {operation: n},
        errors: {code: n}, histograms: {name: {buckets: [n], sum}}}`. `cached_tokens` has the models whose servers tell.
        """
        with self._lock:
            return {
                "tokens": self.tokens,
                "prompt_tokens": dict(self._prompt_tokens),
                "cached_tokens": dict(self._cached_tokens),
                "requests": dict(self._requests),
                "errors": dict(self._errors),
                "histograms": {
                    name: {"buckets": list(self._buckets[name]), "sum": round(self._sums[name], 6)} for name in BOUNDS
                },
            }
