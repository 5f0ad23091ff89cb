"""Whose clock is wrong. No request suffers from it (`protocol.clock`), but logs, certificates and people do."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping

from fleet_worker.protocol.status import InstanceStatus

AGREE_WITHIN = 2.0
"""Seconds. What a host publishes takes some time to arrive."""
ADVICE = "turn on NTP there: requests are answered all the same, but its log, and its checks of certificates, go wrong"
THIS_HOST = ""
"""The name of our own clock, which is 0 s ahead of itself."""


def clocks_of(instances: Iterable[InstanceStatus]) -> dict[str, float]:
    """Return by how many seconds the clock of each host is ahead of ours, as far as the hosts have told their time."""
    return {each.host: each.clock_ahead for each in instances if each.clock_ahead is not None}


def wrong_clocks(ahead: Mapping[str, float]) -> dict[str, float]:
    """Return the hosts whose clocks differ from what most clocks show, ours included, and by how many seconds they are
    ahead of that. Of two clocks, ours counts as right."""
    clocks = {THIS_HOST: 0.0, **ahead}
    shown = sorted(clocks.values())

    def agreeing(host: str) -> tuple[int, bool]:
        first, last = clocks[host] - AGREE_WITHIN, clocks[host] + AGREE_WITHIN
        return bisect_right(shown, last) - bisect_left(shown, first), host == THIS_HOST

    right = clocks[max(clocks, key=agreeing)]
    return {host: each - right for host, each in sorted(clocks.items()) if abs(each - right) > AGREE_WITHIN}


def described(wrong: Mapping[str, float]) -> Iterator[str]:
    for host, ahead in wrong.items():
        whose = f"the clock of {host}" if host else "the clock of this host"
        yield f"{whose} is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the others"
