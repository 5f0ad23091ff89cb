"""Quotas: how much each key may use.

    reservation = await quotas.reserve(key, prompt_tokens + max_tokens)   # raises QuotaExceeded, a `Refused`
    try:
        ...                                # reservation.headers: what an answer tells of the limits
        reservation.settle(usage_tokens)   # what was used, or delivered until the client left
    finally:
        reservation.release()              # nothing was used, unless it was settled

A request reserves its estimate of tokens, and a place among those that run. Neither `settle` nor `release` waits. On
Redis and Valkey the limits hold for all gateways together (`shared_counts`); on RabbitMQ, and while the broker is away,
each gateway counts by itself (`counts`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fleet_worker.broker.async_redis import connection_to
from fleet_worker.broker.topology import transport_of
from fleet_worker.gateway.accounts.counts import Limit, LocalCounts, Taken, Wanted
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.gateway.accounts.quota_texts import Headers, exceeded, headers
from fleet_worker.gateway.accounts.shared_counts import LEASE, Own, SharedCounts
from fleet_worker.settings import Settings

MOST_TOKENS = 10**9
"""That one request may count. A client can ask for any number, and Lua takes a large one for a negative one."""
_NOTHING = Taken(0.0, "", 0, {})


class Quotas:
    """The quotas of all keys. For one event loop; `open` it first, `close` it last.

    Without settings, or on RabbitMQ, it counts alone. `gateway` names this gateway. If it is the same after a restart,
    so that budgets survive one, `spent(key name, since)` has to return the tokens that a key has used here since a time
    in seconds since the epoch.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        gateway: str = "",
        spent: Callable[[str, float], int] = lambda key, since: 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._ahead = 0.0
        """Seconds by which the clock of the broker is ahead of ours: windows begin when it says so."""
        self._local = LocalCounts(spent, lambda: self._clock() + self._ahead)
        self._shared: SharedCounts | None = None
        self._renewals: asyncio.Task[None] | None = None
        self._undecided: set[str] = set()
        """The leases of requests that wait for the broker's answer. Renewed, one that it refuses would hold a place."""
        if settings and transport_of(settings.broker_url) == "redis":
            connect = partial(connection_to, settings)
            self._shared = SharedCounts(gateway or uuid.uuid4().hex, connect, opened=self._report)

    @property
    def are_shared(self) -> bool:
        """Whether the limits hold for all gateways together now."""
        return self._shared is not None and self._shared.are_there

    def open(self) -> None:
        if self._shared:
            self._shared.open()
            self._renewals = asyncio.create_task(self._renew(), name="fleet-leases")

    async def close(self) -> None:
        if self._shared and self._renewals:
            self._renewals.cancel()
            await self._shared.close()

    async def reserve(self, key: Key, tokens: int) -> Reservation:
        """Take a request and its tokens from the limits of a key: its prompt, and the most that it may generate.

        Raises:
            QuotaExceeded: they have no room for it.
        """
        reservation = Reservation(key.name, _wanted(key, tokens), self._settle)
        if reservation.wanted.limits or reservation.wanted.max_parallel:
            await self._take(reservation)
        if reservation.taken.refused:
            raise exceeded(reservation.taken, reservation.wanted, self._local.running(key.name))
        return reservation

    async def _take(self, reservation: Reservation) -> None:
        key, wanted = reservation.key, reservation.wanted
        if not self._shared or not self._shared.are_there:
            reservation.taken = self._local.take(key, wanted)
            return
        reserved = reservation.taken = self._local.take(key, wanted, checks=False)  # for what asks at the same time
        own, late = partial(self._own, key, reserving=True), partial(self._correct, reservation)
        self._undecided.add(wanted.lease)
        try:
            taken = await self._shared.take(key, wanted, own, late)
        except asyncio.CancelledError:
            reservation.release()
            raise
        finally:
            self._undecided.discard(wanted.lease)
        if taken:
            self._ahead = taken.now - self._clock()
            reservation.taken, reservation.is_shared = taken, True
            if not taken.refused:
                return
        self._local.change(key, wanted, [(each, -each.charge) for each in wanted.limits], reserved.now)
        if not taken:
            reservation.taken = self._local.take(key, wanted)

    def _correct(self, reservation: Reservation, counted: Taken) -> None:
        """Have a broker that has answered too late count what was decided without it.

        `counted` is its own answer: what it has counted by then is taken from what is to be counted.
        """
        wanted, admitted = reservation.wanted, not reservation.taken.refused
        goes_on, was_counted = admitted and not reservation.has_ended, not counted.refused
        counts = {limit: admitted if limit.name == "rpm" else goes_on for limit in wanted.limits}
        self._tell(reservation, [(each, each.charge * (counts[each] - was_counted)) for each in counts], not goes_on)
        reservation.is_shared = goes_on
        if goes_on and wanted.lease and self._shared:
            self._shared.renew(reservation.key, [wanted.lease])

    def _settle(self, reservation: Reservation, tokens: int) -> None:
        limits = [each for each in reservation.wanted.limits if each.name != "rpm"]
        charges = [(each, tokens - each.charge) for each in limits]
        self._local.change(reservation.key, reservation.wanted, charges, reservation.taken.now)
        self._tell(reservation, charges if reservation.is_shared else [(each, tokens) for each in limits], True)

    def _tell(self, reservation: Reservation, charges: list[tuple[Limit, int]], has_ended: bool) -> None:
        """Tell the broker what is added to the limits that it counts."""
        lease = reservation.wanted.lease if has_ended else ""
        if self._shared and (charges or lease):
            changes = [(limit, charge, limit.number(reservation.taken.now)) for limit, charge in charges]
            self._shared.settle(reservation.key, lease, changes, partial(self._own, reservation.key))

    def _own(self, key: str, limit: Limit, *, reserving: bool = False) -> Own:
        """Return what this gateway has used of a budget; without this request if it is being reserved now."""
        window = self._local.window(key, limit.name)
        return Own(window.number, max(0, window.amount - (limit.charge if reserving else 0)))

    def _report(self) -> None:
        """Tell a broker that may have forgotten everything what runs here, and what was used of budgets."""
        for key, budgets in self._local.budgets().items():
            if self._shared and budgets:
                self._shared.settle(key, "", [(Limit(name, 0, 0), 0, 0) for name in budgets], partial(self._own, key))
        self._renew_leases()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE / 3)
            self._renew_leases()

    def _renew_leases(self) -> None:
        for key in self._local.budgets():
            if self._shared and (leases := self._local.running(key).keys() - self._undecided):
                self._shared.renew(key, leases)


@dataclass(slots=True)
class Reservation:
    """What a request has taken from the limits of its key."""

    key: str
    wanted: Wanted
    _settle: Callable[[Reservation, int], None]
    taken: Taken = _NOTHING
    """The answer, and the counts with it."""
    is_shared: bool = False
    """Whether the broker counts it."""
    has_ended: bool = False

    @property
    def headers(self) -> Headers:
        """What an answer tells of the limits, as OpenAI does: `x-ratelimit-...`; empty without limits."""
        return headers(self.taken, self.wanted)

    def settle(self, tokens: int) -> None:
        """End the request: it has used so many tokens, of its prompt and its answer. Only the first call counts."""
        if not self.has_ended:
            self.has_ended = True
            if self.wanted.limits or self.wanted.max_parallel:
                self._settle(self, _counted(tokens))

    def release(self) -> None:
        """End the request, if it is not settled: it has used no tokens. It counts as a request."""
        self.settle(0)


def _wanted(key: Key, tokens: int) -> Wanted:
    tokens = _counted(tokens)
    limits = (
        _rate("rpm", key.rpm, 1),
        _rate("tpm", key.tpm, tokens),
        Limit("day", key.budget_per_day, tokens) if key.budget_per_day else None,
        Limit("month", key.budget_per_month, tokens) if key.budget_per_month else None,
    )
    is_counted = key.max_parallel or key.budget_per_day or key.budget_per_month
    return Wanted(uuid.uuid4().hex if is_counted else "", tuple(filter(None, limits)), key.max_parallel)


def _counted(tokens: int) -> int:
    return min(max(0, tokens), MOST_TOKENS)


def _rate(name: str, most: int | None, charge: int) -> Limit | None:
    """A request that may need more than the tokens of a minute gets all of them."""
    return Limit(name, most, min(most, charge)) if most else None
