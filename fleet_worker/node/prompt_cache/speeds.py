"""How fast an MLX server is when it has one request to serve, measured from all that it serves."""

from __future__ import annotations

DECAY = 0.1
"""How much of the difference a slower request takes from the peak."""
MOST = 1e6
"""Tokens per second that are believed at most."""


class PeakSpeed:
    """The highest speed of late, in tokens per second. A request that shared the server proves only that it is at least
    as fast; slower ones that had it for themselves lower the peak step by step."""

    def __init__(self) -> None:
        self.value: float | None = None
        """None until something was measured."""

    def measured(self, tokens: float, seconds: float, *, alone: bool) -> None:
        speed = min(MOST, tokens / seconds)
        if self.value is None or speed > self.value:
            self.value = speed
        elif alone:
            self.value += DECAY * (speed - self.value)
