"""Since when nobody is there who could take a request, as far as the hosts have told."""

from __future__ import annotations

from collections.abc import Iterable

from fleet_worker.protocol.status import InstanceStatus, ModelStatus

Offering = tuple[InstanceStatus, ModelStatus]


def away_for(
    offerings: Iterable[Offering], capability: str, instance: str, node: str | None, *, now: float
) -> float | None:
    """Return for how many seconds none of these was ready that fits: 0 if one is, None if there is none. `now` is
    time.monotonic().

    A host that has been silent for half of the time after which it is forgotten counts as away since it was heard.
    """
    fitting = (
        each
        for each in offerings
        if capability in each[1].capabilities and instance in ("any", each[0].name) and node in (None, each[0].node)
    )
    return min((_away_for(*each, now) for each in fitting), default=None)


def _away_for(instance: InstanceStatus, model: ModelStatus, now: float) -> float:
    silent_for = now - instance.heard_at
    if not instance.ready:
        return silent_for + max(0.0, instance.status_age or 0.0)
    is_there = model.status == "available" and 2 * silent_for < instance.expires_at - instance.heard_at
    return 0.0 if is_there else silent_for
