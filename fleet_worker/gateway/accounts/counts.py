"""How much a key has used: counts in windows of time, and which of its requests run. Pure, but for the state it holds.

Requests and tokens per minute slide: what was used in the minute before counts with the part of it that is less than
60 seconds ago, as if it had been used evenly. Budgets begin anew with each day and each month of UTC.

`LocalCounts` counts for one process. `shared_counts` does the same in Valkey, in Lua.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MINUTE, DAY = 60, 86_400
PERIODS = {"rpm": MINUTE, "tpm": MINUTE, "day": DAY, "month": 0}
"""Seconds in a window of each limit; 0 stands for a month of the calendar."""
BUDGETS = ("day", "month")
PARALLEL = "parallel"
"""The name of the limit that has no window."""


class Window(NamedTuple):
    """What was counted in a window, and in the one before."""

    number: int
    amount: int = 0
    previous: int = 0

    def moved_to(self, number: int) -> Window:
        """Return the window that is current if this one was. If the clock was set back, all counts are kept."""
        if number <= self.number:
            return self._replace(number=number)
        return Window(number, 0, self.amount if number == self.number + 1 else 0)

    def with_charge(self, charge: int, number: int) -> Window:
        """Return it with something more. What is given back is given back to the window `number`, of which it was
        taken, or is forgotten with it."""
        if charge >= 0 or number == self.number:
            return self._replace(amount=max(0, self.amount + charge))
        if number == self.number - 1:
            return self._replace(previous=max(0, self.previous + charge))
        return self


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of a key, and what a request takes of it."""

    name: str
    """One of `PERIODS`."""
    most: int
    charge: int

    def number(self, now: float) -> int:
        return number_of(self.name, now)

    def seconds_left(self, now: float) -> float:
        """Return the seconds until the window ends."""
        if period := PERIODS[self.name]:
            return period - now % period
        year, month = divmod(self.number(now) + 1, 12)
        return calendar.timegm((year, month + 1, 1, 0, 0, 0)) - now

    def used(self, window: Window, now: float) -> float:
        if self.name in BUDGETS:
            return window.amount
        return window.amount + window.previous * self.seconds_left(now) / MINUTE

    def fits(self, window: Window, now: float) -> bool:
        """A budget may be exceeded by the request that uses it up: what a request will take is not known before."""
        used = self.used(window, now)
        return used < self.most if self.name in BUDGETS else used + self.charge <= self.most

    def fits_after(self, window: Window, now: float) -> float:
        """Return the seconds until the request fits, if nothing else is used."""
        left, room = self.seconds_left(now), self.most - self.charge
        if self.name in BUDGETS:
            return left
        if window.amount <= room:
            return max(0.0, left - MINUTE * (room - window.amount) / max(1, window.previous))
        return left + MINUTE * (1 - room / window.amount)

    def empty_after(self, window: Window, now: float) -> float:
        """Return the seconds until all of it can be used again, if nothing else is used."""
        if self.name in BUDGETS:
            return self.seconds_left(now) if window.amount else 0.0
        return self.seconds_left(now) + MINUTE if window.amount else self.seconds_left(now) if window.previous else 0.0


def number_of(name: str, now: float) -> int:
    """Return the number of the window that a time, in seconds since the epoch, is in."""
    if period := PERIODS[name]:
        return int(now // period)
    today = time.gmtime(now)
    return today.tm_year * 12 + today.tm_mon - 1


def begin_of(name: str, now: float) -> float:
    """Return when the window began that a time is in."""
    if period := PERIODS[name]:
        return now - now % period
    year, month = divmod(number_of(name, now), 12)
    return calendar.timegm((year, month + 1, 1, 0, 0, 0))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request wants of the counts of its key."""

    lease: str
    """Names the request while it runs. Empty if nobody has to know how many do."""
    limits: tuple[Limit, ...]
    max_parallel: int | None = None

    @property
    def of_budget(self) -> int:
        """The tokens that it reserves of budgets."""
        return max((each.charge for each in self.limits if each.name in BUDGETS), default=0)


class Taken(NamedTuple):
    """The answer: whether the request was admitted, and the counts with it."""

    now: float
    """Seconds since the epoch, by the clock that the windows follow."""
    refused: str
    """The limit that has no room; `PARALLEL` if too many requests run; empty if it was admitted."""
    running: int
    windows: Mapping[str, Window]


@dataclass(slots=True)
class _Used:
    windows: dict[str, Window] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    """What each request that runs has reserved of the budgets, by its lease."""


class LocalCounts:
    """The counts of this process. For one thread.

    `spent` returns the tokens that a key has used since a time, so that a budget survives a restart. `clock` returns
    seconds since the epoch.
    """

    def __init__(self, spent: Callable[[str, float], int], clock: Callable[[], float]) -> None:
        self._spent = spent
        self._clock = clock
        self._used: dict[str, _Used] = {}

    def take(self, key: str, wanted: Wanted, *, checks: bool = True) -> Taken:
        """Count a request if it fits; without `checks` in any case."""
        now, used = self._clock(), self._used.setdefault(key, _Used())
        windows = {limit.name: self.window(key, limit.name) for limit in wanted.limits}
        used.windows |= windows
        if checks and (refused := _refused(wanted, windows, used.running, now)):
            return Taken(now, refused, len(used.running), windows)
        for limit in wanted.limits:
            windows[limit.name] = windows[limit.name].with_charge(limit.charge, limit.number(now))
        used.windows |= windows
        if wanted.lease:
            used.running[wanted.lease] = wanted.of_budget
        return Taken(now, "", len(used.running), windows)

    def change(self, key: str, wanted: Wanted, charges: Iterable[tuple[Limit, int]], taken_at: float) -> None:
        """End a request that was taken, and add these charges to its limits. Less than 0 is given back."""
        used = self._used[key]
        used.running.pop(wanted.lease, None)
        for limit, charge in charges:
            used.windows[limit.name] = self.window(key, limit.name).with_charge(charge, limit.number(taken_at))

    def window(self, key: str, name: str) -> Window:
        """Return the current window of a limit."""
        now, used = self._clock(), self._used.setdefault(key, _Used())
        number = number_of(name, now)
        if name in used.windows:
            return used.windows[name].moved_to(number)
        return Window(number, self._spent(key, begin_of(name, now)) if name in BUDGETS else 0)

    def running(self, key: str) -> Mapping[str, int]:
        """Return the leases of the requests that run, and what each has reserved of the budgets."""
        return self._used[key].running if key in self._used else {}

    def budgets(self) -> dict[str, list[str]]:
        """Return by key the budgets of which it has used something."""
        return {key: [name for name in BUDGETS if name in used.windows] for key, used in self._used.items()}


def _refused(wanted: Wanted, windows: Mapping[str, Window], running: Mapping[str, int], now: float) -> str:
    if wanted.max_parallel and len(running) >= wanted.max_parallel:
        return PARALLEL
    return next((each.name for each in wanted.limits if not each.fits(windows[each.name], now)), "")
