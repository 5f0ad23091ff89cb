"""The hours of a week, as in `mon-fri 19:00-08:00, sat, sun`: how such a text is read, and when its hours are.

Times are those of a wall clock. What daylight saving does to the clock is thus what it does to the hours: an hour that
the clock skips is skipped, and one that it repeats counts twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
DAY = 24 * 60
WEEK = 7 * DAY
UNDERSTOOD = (
    'hours are understood as "mon-fri 19:00-08:00", "sat, sun 10:00-18:00", "sat, sun" for whole days, "22:00-06:00" '
    "for every day, and several of them after commas or as a list"
)

_TIMES = re.compile(r"(\d{1,2}):(\d{2})\s*[-\u2013]\s*(\d{1,2}):(\d{2})$")
_RANGE_OF_DAYS = re.compile(r"([a-z]+)(?:\s*[-\u2013]\s*([a-z]+))?$")

Span = tuple[int, int]
"""First minute of the week that belongs to it, Monday 00:00 being 0, and the first one after it."""


@dataclass(frozen=True, slots=True)
class Hours:
    """The hours of a week; no `spans`: none at all."""

    spans: tuple[Span, ...]
    """In order, neither overlapping nor adjacent, within 0 to WEEK."""

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Hours:
        """Return the hours that the texts name together; raises `ValueError`, which shows what is understood."""
        try:
            return cls(tuple(_merged([span for text in texts for span in _spans_of(text)])))
        except ValueError as error:
            raise ValueError(f"{error}; {UNDERSTOOD}") from None

    def contain(self, local: datetime) -> bool:
        minute = minute_of_week(local)
        return any(first <= minute < end for first, end in self.spans)

    def minutes_to_change(self, local: datetime) -> int | None:
        """Return how many minutes after the beginning of the present one they begin or end; None if they never do."""
        minute = minute_of_week(local)
        edges = {edge % WEEK for span in self.spans for edge in span}
        if self.spans and self.spans[0][0] == 0 and self.spans[-1][1] == WEEK:
            edges.discard(0)  # Sunday's end is no end
        return min(((edge - minute - 1) % WEEK + 1 for edge in edges), default=None)


def minute_of_week(local: datetime) -> int:
    return local.weekday() * DAY + local.hour * 60 + local.minute


def _spans_of(text: str) -> Iterator[Span]:
    """Days share the times that follow them: `sat, sun 10:00-18:00`. Those that none follow are whole days."""
    days: list[int] = []
    days_are_used = False
    for part in text.strip().lower().split(","):
        names, first, end = _read(part.strip())
        if names:
            days = names if days_are_used else days + names
            days_are_used = False
        if first is None or end is None:
            continue
        length = end - first if end > first else end - first + DAY
        for day in days or range(7):
            yield day * DAY + first, day * DAY + first + length
        days_are_used = True
    if not days_are_used:
        yield from ((day * DAY, (day + 1) * DAY) for day in days)


def _read(part: str) -> tuple[list[int], int | None, int | None]:
    """Return the days of a part, its first minute and its last: both None if it names no times."""
    times = _TIMES.search(part)
    days = part[: times.start()].strip() if times else part
    names = _days(days) if days or not times else []
    if not times:
        return names, None, None
    first, end = (_minute(*times.group(n, n + 1)) for n in (1, 3))
    if first == DAY:
        raise ValueError("no day begins at 24:00: write 00:00")
    if first == end:
        raise ValueError("hours begin and end at the same time: for a whole day leave the times out")
    return names, first, end


def _days(text: str) -> list[int]:
    found = _RANGE_OF_DAYS.match(text)
    if not found:
        raise ValueError("a part is neither days nor times" if text else "a part is empty")
    first, last = (_day(name) for name in (found[1], found[2] or found[1]))
    return [(first + n) % 7 for n in range((last - first) % 7 + 1)]


def _day(name: str) -> int:
    for number, day in enumerate(DAYS):
        if name in (day, day[:3]):
            return number
    raise ValueError(f"days are {', '.join(day[:3] for day in DAYS)}, or their whole names")


def _minute(hour: str, minute: str) -> int:
    minutes = int(hour) * 60 + int(minute)
    if int(minute) > 59 or minutes > DAY:
        raise ValueError("times are from 00:00 to 24:00")
    return minutes


def _merged(spans: list[Span]) -> Iterator[Span]:
    """Yield the same minutes as `Hours.spans` has to have them."""
    within = [(first, min(end, WEEK)) for first, end in spans]
    within += [(0, end - WEEK) for first, end in spans if end > WEEK]
    last: Span | None = None
    for first, end in sorted(within):
        if last and first <= last[1]:
            last = (last[0], max(last[1], end))
        else:
            if last:
                yield last
            last = (first, end)
    if last:
        yield last
