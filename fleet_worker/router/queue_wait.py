"""How long a request will wait in its lane: an estimate from what one router sees of that lane. Pure: it has no clock.

    wait = place in the lane * seconds until the next one leaves it / share of the slots that is left for it

- The place counts what waits with the same or a higher priority, and no slot that is free.
- One leaves the lane when a slot becomes free. In the time that requests waited, `busy`, so many were `completed`;
  before that is known, each of the `slots` is expected to become free once in `service` seconds, the mean that a
  request took so far. If none becomes free for longer, they are expected to be slower.
- Requests of a higher priority that come meanwhile go first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import get_args

from fleet_worker.protocol.request import Priority

SEEN_FOR = 10.0
"""Seconds after which what was seen of a lane counts a third. Longer if three requests take longer."""
FIRST_SERVICE = 1.0
"""Seconds that a request is expected to take until one has ended."""
SMOOTHING = 0.05
"""The weight of the newest answer of the broker in averages."""
SERVICES_SEEN = 100
"""Requests over which `service` is averaged."""
LEAST_LEFT = 0.02
"""The share of the slots that is left for a priority, if more of higher ones come than the fleet can do."""
RANKS: dict[Priority, int] = {level: rank for rank, level in enumerate(get_args(Priority))}
"""The place of each priority in a list by priority, the highest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is known of a lane, for a request of one priority."""

    ahead: float
    """Requests that wait and go first."""
    idle: int = 0
    """Slots that are surely free."""
    slots: int = 1
    service: float = 0.0
    """Mean seconds from acceptance to the end."""
    busy: float = 0.0
    """Seconds in which requests waited."""
    completed: float = 0.0
    """Requests that ended in that time."""
    overtakers: float = 0.0
    """Requests of higher priorities that come in a second, if many of them do."""


def estimate(seen: Seen) -> float:
    """Return the seconds that a request will wait."""
    place = max(0.0, seen.ahead + 1 - seen.idle)
    each = seconds_each(seen)
    return place * each / max(1.0 - seen.overtakers * each, LEAST_LEFT)


def seconds_each(seen: Seen) -> float:
    """Return the seconds from one request that leaves the lane to the next."""
    return (seen.busy + seen.service) / (seen.completed + max(1, seen.slots))


class LaneLoad:
    """What one router sees of a lane: its own requests, and now and then how many wait in all. Times are
    time.monotonic() seconds. Not thread-safe."""

    def __init__(self) -> None:
        self.slots = 1
        """Of the instances that are ready."""
        self.depths: tuple[int, ...] = (0,)
        """Requests that wait, by priority, the highest first; or one number for all."""
        self.service = FIRST_SERVICE
        self._services = 0
        self._running = 0
        self._waiting = [0] * len(RANKS)
        self._entered_since = [0] * len(RANKS)
        """Requests of this router that have entered the lane since `depths` was told, without those that left it."""
        self._all = self._own = 0.0
        """Requests that wait, and those of them that are of this router; smoothed."""
        self._busy = self._completed = 0.0
        self._entered = [0.0] * len(RANKS)
        self._unseen = 1.0
        """The part of the time in which this lane was not watched yet."""
        self._at: float | None = None

    def tell(self, depths: Sequence[int], slots: int, entered_before: Sequence[int], now: float) -> None:
        """Learn the broker's answer. It is without what entered after the question; before it, `entered` was this."""
        self._pass(now)
        self.depths, self.slots = tuple(depths), slots
        self._entered_since = [
            since - before for since, before in zip(self._entered_since, entered_before, strict=True)
        ]
        self._all += SMOOTHING * (sum(depths) - self._all)
        self._own += SMOOTHING * (sum(self._waiting) - self._own)

    @property
    def entered(self) -> list[int]:
        """Requests of this router, by priority, that the broker's next answer will include: for `tell`."""
        return list(self._entered_since)

    def enter(self, priority: Priority, now: float) -> None:
        """A request is sent into the lane."""
        self._pass(now)
        self._waiting[RANKS[priority]] += 1
        self._entered_since[RANKS[priority]] += 1
        self._entered[RANKS[priority]] += 1

    def accept(self, priority: Priority, now: float) -> float:
        """A node has accepted one of our requests. Return how many requests of all routers that stands for."""
        stands_for = max(1.0, self._all / self._own) if self._own else 1.0
        self.leave(priority, now)
        self._running += 1
        return stands_for

    def leave(self, priority: Priority, now: float) -> None:
        """One of our requests has left the lane: a node accepted it, or it ended."""
        self._pass(now)
        self._waiting[RANKS[priority]] -= 1
        self._entered_since[RANKS[priority]] -= 1

    def complete(self, seconds: float, stands_for: float, now: float) -> None:
        """One has ended, so many `seconds` after a node had accepted it. `stands_for` is what `accept` returned."""
        self._pass(now)
        self._running -= 1
        self._services = min(self._services + 1, SERVICES_SEEN)
        self.service += (seconds - self.service) / self._services
        if self._is_backlogged:
            self._completed += stands_for

    @property
    def is_served(self) -> bool:
        """Whether a node works on one of our requests."""
        return self._running > 0

    def take_slot(self) -> None:
        """A slot that serves this lane works on one of our requests that came another way."""
        self._running += 1

    def free_slot(self) -> None:
        self._running -= 1

    def seen(self, priority: Priority, now: float) -> Seen:
        """Return what is known of the lane, for a request of this priority."""
        self._pass(now)
        rank = RANKS[priority]
        first = slice(rank + 1)
        ahead = sum(self._entered_since[first]) + self._told(first)
        return Seen(
            ahead=max(0.0, ahead),
            idle=0 if any(self.depths) else max(0, self.slots - self._running),
            slots=max(self.slots, self._running, 1),
            service=self.service,
            busy=self._busy,
            completed=self._completed,
            overtakers=_at_most(sum(self._entered[:rank])) / (self._window * (1 - self._unseen)),
        )

    def _told(self, first: slice) -> float:
        """Return how many of `depths` go first. If the broker told one number for all priorities, those of this router
        are taken for typical."""
        if len(self.depths) == len(RANKS):
            return sum(self.depths[first])
        own = sum(self._waiting)
        return sum(self.depths) * (sum(self._waiting[first]) / own if own else 1.0)

    @property
    def _is_backlogged(self) -> bool:
        return any(self._waiting)

    @property
    def _window(self) -> float:
        return max(SEEN_FOR, 3 * self.service)

    def _pass(self, now: float) -> None:
        """Let time pass: what was seen counts less and less."""
        fades = math.exp(-(now - (now if self._at is None else self._at)) / self._window)
        self._busy = self._busy * fades + (self._window * (1 - fades) if self._is_backlogged else 0.0)
        self._completed *= fades
        self._unseen = max(0.0, min(self._unseen * fades, 1 - 1 / self._window))
        self._entered = [each * fades for each in self._entered]
        self._at = now


def _at_most(number: float) -> float:
    """Return how many may come next time, where so many came now: chance brings more in one of forty cases. Prefer the
    larger number: a request that gets only a small rest of the slots waits twice as long if a few more come."""
    return number + 2 * math.sqrt(number)


class Place:
    """One attempt of a request, from when it is sent into its lane until its end. Each method may be called twice."""

    def __init__(
        self,
        load: LaneLoad,
        lock: AbstractContextManager[object],
        priority: Priority,
        now: float,
        beside: LaneLoad | None = None,
    ) -> None:
        """`beside` is another lane that its node serves with the same slots."""
        self._load = load
        self._beside = beside
        self._lock = lock
        self._priority = priority
        self._accepted_at: float | None = None
        self._stands_for = 1.0
        self._ended = False
        with lock:
            load.enter(priority, now)

    def accepted(self, now: float) -> None:
        with self._lock:
            if self._accepted_at is None and not self._ended:
                self._accepted_at = now
                self._stands_for = self._load.accept(self._priority, now)
                if self._beside:
                    self._beside.take_slot()

    def ended(self, now: float) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if self._accepted_at is None:
                self._load.leave(self._priority, now)
            else:
                self._load.complete(now - self._accepted_at, self._stands_for, now)
                if self._beside:
                    self._beside.free_slot()
