"""What a client is told of the limits of its key: headers of each answer, and why a request is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fleet_worker.gateway.accounts.counts import BUDGETS, PARALLEL, Taken, Wanted
from fleet_worker.gateway.problems import Problem, Refused

BUSY_RETRY_AFTER = 1.0
"""Seconds after which a place among the running requests may be free again."""
_NOUNS = {"rpm": "request", "tpm": "token"}

Headers = tuple[tuple[bytes, bytes], ...]


class QuotaExceeded(Refused):
    """A limit of the key has no room for the request. `limit` is rpm, tpm, parallel, day or month."""

    def __init__(self, limit: str, problem: Problem) -> None:
        super().__init__(problem)
        self.limit = limit


def exceeded(taken: Taken, wanted: Wanted, running: Mapping[str, int]) -> QuotaExceeded:
    """Return the error of a refused request. `running`: what each request of the key that runs on this gateway has
    reserved of budgets, by its lease."""
    if taken.refused == PARALLEL:
        text = f"this key may run {_count(wanted.max_parallel or 0, 'request')} at the same time"
        return _later(taken, wanted, text, BUSY_RETRY_AFTER)
    limit = next(each for each in wanted.limits if each.name == taken.refused)
    window = taken.windows[limit.name]
    if limit.name not in BUDGETS:
        text = f"this key may use {_count(limit.most, _NOUNS[limit.name])} per minute"
        return _later(taken, wanted, text, limit.fits_after(window, taken.now))
    text = f"this key may use {_count(limit.most, 'token')} per {limit.name}, which are used up"
    if taken.running > len(running) or window.amount - sum(running.values()) < limit.most:
        return _later(taken, wanted, f"{text}, or reserved for its requests that run", BUSY_RETRY_AFTER)
    text = f"{text}; a new {limit.name} begins in {_duration(limit.seconds_left(taken.now))}"
    return QuotaExceeded(
        limit.name,
        Problem(
            status=429,
            code="insufficient_quota",
            message=text,
            may_retry=False,
            more_headers=headers(taken, wanted),
        ),
    )


def _later(taken: Taken, wanted: Wanted, text: str, retry_after: float) -> QuotaExceeded:
    problem = Problem(
        status=429,
        code="rate_limit_exceeded",
        message=f"{text}: try again in {_duration(retry_after)}",
        retry_after=retry_after,
        may_retry=True,
        more_headers=headers(taken, wanted),
    )
    return QuotaExceeded(taken.refused, problem)


def headers(taken: Taken, wanted: Wanted) -> Headers:
    """Return what is left of the limits of a minute. There are no such headers for budgets."""
    shown: list[tuple[bytes, bytes]] = []
    for limit in wanted.limits:
        if noun := _NOUNS.get(limit.name):
            name = b"%ss" % noun.encode()
            window = taken.windows[limit.name]
            left = max(0, int(limit.most - limit.used(window, taken.now)))
            shown += [
                (b"x-ratelimit-limit-" + name, b"%d" % limit.most),
                (b"x-ratelimit-remaining-" + name, b"%d" % left),
                (b"x-ratelimit-reset-" + name, b"%.3fs" % limit.empty_after(window, taken.now)),
            ]
    return tuple(shown)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """For people: `2.4 s`, `3 min`, `5 h`, `12 days`."""
    for unit, name, below in ((1.0, "s", 120.0), (60.0, "min", 7200.0), (3600.0, "h", 172_800.0)):
        if seconds < below:
            return f"{math.ceil(10 * seconds) / 10:g} s" if unit == 1 else f"{math.ceil(seconds / unit)} {name}"
    return f"{math.ceil(seconds / 86_400)} days"
