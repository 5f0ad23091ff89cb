"""How much a router remembers of what it hears: anybody who reaches the broker may announce any number of nodes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

MOST_BYTES = 48 * 1024 * 1024
"""Bytes of memory, estimated. A thousand hosts with three models each take 15 MB."""
BYTES_PER_VALUE = 60
"""What each value of a JSON text takes in addition to its characters."""


def memory_of(body: bytes) -> int:
    """Estimate what the content of a JSON text takes in memory."""
    return len(body) + BYTES_PER_VALUE * (body.count(b",") + body.count(b"[") + body.count(b"{"))


class MemoryBound:
    """The estimated memory of each thing that is remembered, and of all. For use under a lock."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._each: dict[Hashable, int] = {}
        self._all = 0

    def remember(self, name: Hashable, its_bytes: int) -> bool:
        """Return whether there is room for it; if there is, it takes so many bytes from now on."""
        grown = self._all - self._each.get(name, 0) + its_bytes
        if grown > self._most_bytes:
            return False
        self._each[name], self._all = its_bytes, grown
        return True

    def forget(self, name: Hashable) -> None:
        self._all -= self._each.pop(name, 0)

    def keep_only(self, names: Iterable[Hashable]) -> None:
        self._each = {name: self._each.get(name, 0) for name in names}
        self._all = sum(self._each.values())
