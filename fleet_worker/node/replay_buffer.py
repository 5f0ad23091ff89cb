"""What a node has published a moment ago, and a broker that was lost may have forgotten."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

from fleet_worker.protocol.reply import Reply

WINDOW = 5.0
"""Seconds for which a message counts as recent."""
MOST_BYTES = 16 * 1024 * 1024
"""Of all of them."""
AT_ONCE = 1024 * 1024
"""Bytes of one message that is published again."""


class ReplayBuffer:
    """The replies of the last seconds, for one thread: each with the reply queue that it went to."""

    def __init__(self) -> None:
        self._messages: deque[tuple[float, str, bytes]] = deque()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._messages)

    def add(self, reply_to: str, body: bytes) -> None:
        self._messages.append((time.monotonic(), reply_to, body))
        self._bytes += len(body)
        self._forget_old()

    def readers(self) -> set[str]:
        """The reply queues that got something."""
        self._forget_old()
        return {reply_to for _, reply_to, _ in self._messages}

    def again(self) -> list[tuple[str, bytes]]:
        """Return the same frames in few messages, because the broker confirms each, and meanwhile no new frame leaves.

        They are recent again: the broker may be lost once more before anybody has read them.
        """
        bodies: dict[str, list[bytes]] = {}
        for _, reply_to, body in self._messages:
            bodies.setdefault(reply_to, []).append(body)
        self._messages, self._bytes = deque(), 0
        for reply_to, parts in bodies.items():
            for parcel in _parcels(parts):
                self.add(reply_to, Reply.merged(parcel))
        return [(reply_to, body) for _, reply_to, body in self._messages]

    def _forget_old(self) -> None:
        oldest = time.monotonic() - WINDOW
        while self._messages and (self._messages[0][0] < oldest or self._bytes > MOST_BYTES):
            self._bytes -= len(self._messages.popleft()[2])


def _parcels(bodies: Iterable[bytes]) -> Iterator[list[bytes]]:
    """In their order, as many at a time as are `AT_ONCE` bytes together; a longer one alone."""
    parcel: list[bytes] = []
    size = 0
    for body in bodies:
        if parcel and size + len(body) > AT_ONCE:
            yield parcel
            parcel, size = [], 0
        parcel.append(body)
        size += len(body)
    yield parcel
