"""The frames for one router that wait for their publish, and when they are due."""

from __future__ import annotations

import time

from fleet_worker.protocol.reply import Frame

GAP_PER_REQUEST, LONGEST_GAP = 0.0003, 0.010
"""Seconds from one publish to the next: the more requests are in progress, the longer. First tokens and last frames do
not wait for it. At 32 streams of 50 tokens/s a gap of 5 ms makes 3,500 messages of 20,000, for a third of the CPU."""
GAP_PER_WAITING_MESSAGE, LONGEST_GAP_BEHIND = 0.0002, 1.0
"""Seconds for each message that waits for the router: about what it needs to read one. A router that cannot keep up
makes all of its nodes gather more, until it can: then about one message of each node waits."""
NEVER = float("inf")


class Outbox:
    """Frames in their order. All calls are made under one lock, that of the publisher. Times are time.monotonic()
    seconds."""

    def __init__(self) -> None:
        self.due = NEVER
        """When its frames must be published."""
        self._frames: list[Frame] = []
        self._oldest = 0.0
        """When the first of them came."""
        self._last_publish = 0.0
        self._gap_behind = 0.0
        """Seconds from one publish to the next, by how far the router is behind."""

    def append(self, frame: Frame, delay: float | None, requests: int) -> None:
        """Add a frame that is due in `delay` seconds; with None, at `gap_end`."""
        now = time.monotonic()
        self._oldest = self._oldest if self._frames else now
        self._frames.append(frame)
        self.due = min(self.due, self.gap_end(requests) if delay is None else now + delay)

    def gap_end(self, requests: int) -> float:
        """Return when the gap after the last publish is over, at a node with so many requests in progress."""
        return self._last_publish + max(min(LONGEST_GAP, requests * GAP_PER_REQUEST), self._gap_behind)

    def take(self, now: float) -> list[Frame]:
        """Return all frames, in their order, to be published now."""
        frames, self._frames = self._frames, []
        self._last_publish, self.due = now, NEVER
        return frames

    def learn(self, waiting: int) -> None:
        """So many messages wait for the router at the broker."""
        self._gap_behind = min(LONGEST_GAP_BEHIND, waiting * GAP_PER_WAITING_MESSAGE)

    def waits(self, now: float) -> float:
        """Return for how many seconds the first of the frames has waited; 0 if there is none."""
        return now - self._oldest if self._frames else 0.0

    def __len__(self) -> int:
        return len(self._frames)
