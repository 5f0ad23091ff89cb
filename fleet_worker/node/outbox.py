"""The frames for one router that wait for their publish, and when they are due."""

from __future__ import annotations

import time

from fleet_worker.protocol.reply import Deltas, Frame

GAP_PER_REQUEST, LONGEST_GAP = 0.0003, 0.010
"""Seconds from one publish to the next: the more requests are in progress, the longer. First tokens and last frames do
not wait for it. At 32 streams of 50 tokens/s a gap of 5 ms makes 3,500 messages of 20,000, for a third of the CPU."""
GAP_PER_WAITING_MESSAGE, LONGEST_GAP_BEHIND = 0.0002, 1.0
"""Seconds for each message that waits for the router: about what it needs to read one. A router that cannot keep up
makes all of its nodes gather more, until it can: then about one message of each node waits."""
MOST_JOINED, MOST_DELTAS, MOST_CHARACTERS = 32, 4, 200
"""How many frames may become one; how many deltas each of these may have, and each delta how many characters. One
frame cannot be cut into two messages. A router needs a third of the time for a token that shares a frame."""
NEVER = float("inf")


class Outbox:
    """Frames in their order. All calls are made under one lock, that of the publisher. Times are time.monotonic()
    seconds."""

    def __init__(self) -> None:
        self.due = NEVER
        """When its frames must be published."""
        self._runs: list[list[Frame]] = []
        """Frames in their order; those in one list are published as one."""
        self._growing: dict[tuple[str, int], list[Frame]] = {}
        """The list that the next small deltas of an attempt are added to, unless it is empty or full."""
        self._count = 0
        self._oldest = 0.0
        """When the first of them came."""
        self._last_publish = 0.0
        self._gap_behind = 0.0
        """Seconds from one publish to the next, by how far the router is behind."""

    def append(self, frame: Frame, delay: float | None, requests: int) -> bool:
        """Add a frame that is due in `delay` seconds; with None, at `gap_end`.

        Return False if its deltas were added to the last frame of the same attempt, which still waited: then the next
        frame has to have the same number.
        """
        now = time.monotonic()
        self._oldest = self._oldest if self._count else now
        self._count += 1
        self.due = min(self.due, self.gap_end(requests) if delay is None else now + delay)
        if isinstance(frame, Deltas):
            return self._append_deltas(frame)
        self._runs.append([frame])
        return True

    def _append_deltas(self, frame: Deltas) -> bool:
        attempt, is_small = (frame.id, frame.attempt), _is_small(frame)
        growing = self._growing.get(attempt)
        if growing and is_small and len(growing) < MOST_JOINED:
            growing.append(frame)
            return False
        run: list[Frame] = [frame]
        self._runs.append(run)
        self._growing[attempt] = run if is_small else []
        return True

    def gap_end(self, requests: int) -> float:
        """Return when the gap after the last publish is over, at a node with so many requests in progress."""
        return self._last_publish + max(min(LONGEST_GAP, requests * GAP_PER_REQUEST), self._gap_behind)

    def take(self, now: float) -> list[Frame]:
        """Return all frames, in their order, to be published now."""
        frames = [_joined(run) for run in self._runs]
        self._runs, self._growing, self._count = [], {}, 0
        self._last_publish, self.due = now, NEVER
        return frames

    def learn(self, waiting: int) -> None:
        """So many messages wait for the router at the broker."""
        self._gap_behind = min(LONGEST_GAP_BEHIND, waiting * GAP_PER_WAITING_MESSAGE)

    def waits(self, now: float) -> float:
        """Return for how many seconds the first of the frames has waited; 0 if there is none."""
        return now - self._oldest if self._count else 0.0

    def __len__(self) -> int:
        """Return how many frames were appended since the last publish."""
        return self._count


def _is_small(frame: Deltas) -> bool:
    """Return whether it may be joined with others. A tool call may come in one piece, which may be long."""
    if len(frame.deltas) > MOST_DELTAS:
        return False
    for delta in frame.deltas:  # several times as fast as any()
        characters = len(delta.content or "") + len(delta.reasoning or "")
        if characters > MOST_CHARACTERS or delta.tool_calls:
            return False
    return True


def _joined(run: list[Frame]) -> Frame:
    """Return one frame with the deltas of all."""
    if len(run) == 1:
        return run[0]
    parts = [frame for frame in run if isinstance(frame, Deltas)]
    deltas = [delta for part in parts for delta in part.deltas]
    return parts[0].model_copy(update={"deltas": deltas, "tokens": parts[-1].tokens})
