"""Why the prompt cache of a server helps less than it could, as far as its node can tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from fleet_worker.protocol.status import CacheTrouble

FORGOTTEN_AFTER = 3600.0
"""Seconds after which a trouble that was not seen again is forgotten."""
LONG = 1_000
"""Tokens from which it matters whether a beginning is found in the cache."""
CHANGED_PROMPTS, CHANGED_SHARE = 3, 0.02
"""Fewer may be different conversations that began with the same words."""
UNUSED_BEGINNINGS = 5
MOST = 1_000
"""Requests after which older ones count half."""
REQUESTS, SHARE = 20, 0.1
"""A cache is too small if so many requests were seen, and more than this share of them came too late."""


@dataclass(slots=True)
class _Counted:
    """How often something was seen, of how many requests; and the last one."""

    count: int = 0
    of: int = 0
    model: str = ""
    request_id: str = ""
    at: float = 0.0


class Troubles:
    """Counts what each request shows. Holds nothing of a prompt."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changing, self._unused, self._too_small = _Counted(), _Counted(), _Counted()

    def began(self, model: str, request_id: str, *, changes: bool | None) -> None:
        """A prompt came that begins differently from the last one of its conversation, or not (None: unknown)."""
        if changes is not None:
            self._count(self._changing, model, request_id, seen=changes)

    def repeated(self, model: str, request_id: str, *, cached: int) -> None:
        """A prompt began with at least `LONG` tokens that should be in the cache; so many tokens were."""
        if cached:
            self._unused = _Counted()
        else:
            self._count(self._unused, model, request_id, seen=True)

    def answered(self, model: str, request_id: str, *, came_too_late: bool) -> None:
        """An answer has ended whose prompt a larger cache would have held, or not."""
        self._count(self._too_small, model, request_id, seen=came_too_late)

    def forget_cache(self) -> None:
        """The server was restarted: another setting may be in force."""
        self._unused, self._too_small = _Counted(), _Counted()

    def found(self) -> tuple[CacheTrouble, ...]:
        """Return one trouble of each kind at most."""
        changing, unused, small = self._changing, self._unused, self._too_small
        found = []
        if self._is_recent(changing) and changing.count >= max(CHANGED_PROMPTS, CHANGED_SHARE * changing.of):
            found.append(_trouble("changing", changing))
        if self._is_recent(unused) and unused.count >= UNUSED_BEGINNINGS:
            found.append(_trouble("unused", unused))
        elif self._is_recent(small) and small.of >= REQUESTS and small.count > SHARE * small.of:
            found.append(_trouble("small", small))
        return tuple(found)

    def _count(self, counted: _Counted, model: str, request_id: str, *, seen: bool) -> None:
        now = self._clock()
        if counted.of and now - counted.at >= FORGOTTEN_AFTER:
            counted.count = counted.of = 0
        if not counted.of:
            counted.at = now
        if counted.of >= MOST:
            counted.count, counted.of = counted.count // 2, counted.of // 2
        counted.of += 1
        if seen:
            counted.count += 1
            counted.model, counted.request_id, counted.at = model, request_id, now

    def _is_recent(self, counted: _Counted) -> bool:
        return self._clock() - counted.at < FORGOTTEN_AFTER


def _trouble(kind: str, counted: _Counted) -> CacheTrouble:
    return CacheTrouble(
        kind=kind, model=counted.model, count=counted.count, of=counted.of, request_id=counted.request_id
    )
