"""What was published a moment ago: a broker that is lost, or the connection of a router, may have lost it, too."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

from fleet_worker.protocol.reply import Reply

REPLAY_WINDOW = 5.0
REPLAY_MAX_BYTES = 16 * 1024 * 1024
"""Messages are kept for so many seconds, and together so many bytes, to be published again."""
REPLAY_MESSAGE_BYTES = 256 * 1024
"""Bytes up to which they are merged into one message."""


class ReplayBuffer:
    """The messages of the last seconds with their reply queues, to be published again. For one thread."""

    def __init__(self) -> None:
        self._messages: deque[tuple[float, str, bytes]] = deque()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._messages)

    def add(self, reply_to: str, body: bytes) -> None:
        self._messages.append((time.monotonic(), reply_to, body))
        self._bytes += len(body)
        self._drop_old()

    def reply_queues(self) -> set[str]:
        self._drop_old()
        return {reply_to for _, reply_to, _ in self._messages}

    def take(self, reply_queues: set[str] | None = None) -> list[tuple[str, bytes]]:
        """Take out the messages to these queues, or all, and return their frames in few messages: the broker confirms
        each, and meanwhile no new frame is sent."""
        bodies: dict[str, list[bytes]] = {}
        kept: deque[tuple[float, str, bytes]] = deque()
        for message in self._messages:
            _, reply_to, body = message
            if reply_queues is None or reply_to in reply_queues:
                bodies.setdefault(reply_to, []).append(body)
                self._bytes -= len(body)
            else:
                kept.append(message)
        self._messages = kept
        return [(reply_to, Reply.merged(group)) for reply_to, parts in bodies.items() for group in _grouped(parts)]

    def _drop_old(self) -> None:
        oldest = time.monotonic() - REPLAY_WINDOW
        while self._messages and (self._messages[0][0] < oldest or self._bytes > REPLAY_MAX_BYTES):
            self._bytes -= len(self._messages.popleft()[2])


def _grouped(bodies: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield them in their order, in groups of up to `REPLAY_MESSAGE_BYTES`; a longer one alone."""
    group: list[bytes] = []
    size = 0
    for body in bodies:
        if group and size + len(body) > REPLAY_MESSAGE_BYTES:
            yield group
            group, size = [], 0
        group.append(body)
        size += len(body)
    yield group
