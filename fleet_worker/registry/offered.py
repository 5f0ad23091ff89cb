"""What the fleet offers: one model on one instance; and since when nobody is there who offers it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fleet_worker.protocol.status import InstanceStatus, ModelStatus


@dataclass(frozen=True, slots=True)
class Offered:
    """An offering: one model on one instance, now. It is `ready` if both are available."""

    model: str
    capabilities: tuple[str, ...]
    features: tuple[str, ...]
    limits: dict[str, Any]
    ready: bool
    instance: InstanceStatus

    @property
    def node(self) -> str:
        return self.instance.node

    @property
    def host(self) -> str:
        return self.instance.host


def fits(instance: InstanceStatus, name: str, node: str | None) -> bool:
    """Return whether this instance has the `name` that a request asks for ("any" for all), and the `node` if one."""
    return name in ("any", instance.name) and node in (None, instance.node)


def away_for(known: Iterable[tuple[InstanceStatus, ModelStatus]], *, now: float) -> float | None:
    """Return for how many seconds none of these was ready: 0 if one is, None if there is none. `now` is
    time.monotonic().

    A host that has been silent for half of the time after which it is forgotten counts as away since it was heard.
    """
    return min((_away_for(*each, now) for each in known), default=None)


def _away_for(instance: InstanceStatus, model: ModelStatus, now: float) -> float:
    silent_for = now - instance.heard_at
    if not instance.ready:
        return silent_for + max(0.0, instance.status_age or 0.0)
    is_there = model.status == "available" and 2 * silent_for < instance.expires_at - instance.heard_at
    return 0.0 if is_there else silent_for
