"""How many seconds of prefill an MLX server has before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable


class Prefills:
    """The prompts that a server is reading, each with the seconds that this takes alone. They share its time equally,
    whatever the true order is: what counts is the sum."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[Hashable, float] = {}
        self._at = clock()

    def began(self, prompt: Hashable, seconds: float) -> None:
        self._advance()
        self._left[prompt] = seconds

    def ended(self, prompt: Hashable) -> None:
        """Its first token has come, or none will."""
        self._advance()
        self._left.pop(prompt, None)

    @property
    def left(self) -> float:
        """Seconds, of all of them together."""
        self._advance()
        return sum(self._left.values())

    def _advance(self) -> None:
        """Take what the server has done since the last time from the prompts that still have something left."""
        now = self._clock()
        passed, self._at = now - self._at, now
        if busy := sum(left > 0 for left in self._left.values()):
            self._left = {prompt: max(0.0, left - passed / busy) for prompt, left in self._left.items()}
