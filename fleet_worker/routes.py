"""Which way an attempt takes: its lane, where whoever is free takes it, or the direct lane of one node."""

from __future__ import annotations

import random
from collections.abc import Collection

from fleet_worker.messages import FleetRequest
from fleet_worker.registry import Registry

__all__ = ["Routes"]


class Routes:
    """Decides by what the registry says at the moment."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def node_for(self, request: FleetRequest, failed: Collection[str] = ()) -> str | None:
        """Return the node that this attempt should go to, as it failed on these already; None for its lane.

        The lane is best, but not if somebody takes from it who has just failed, or who is not of the instance that is
        asked for; while there is nobody else, it is all there is. Who has more slots is chosen more often.
        """
        if not failed and request.provider_instance == "any":
            return None
        ready, wanted = self._ready(request), request.provider_instance
        fit = {
            node: slots
            for node, (instance, slots) in ready.items()
            if node not in failed and wanted in ("any", instance)
        }
        if not fit or len(fit) == len(ready):
            return None
        return random.choices(list(fit), list(fit.values()))[0]  # noqa: S311 - it spreads load

    def is_ready(self, request: FleetRequest, node: str) -> bool:
        """Is this node there to take it?"""
        return node in self._ready(request)

    def _ready(self, request: FleetRequest) -> dict[str, tuple[str, int]]:
        """Return who takes from the lane of this request: its instance and slots, by node."""
        offered = self._registry.offerings(model=request.model, capability=request.operation, ready=True)
        return {each.node: (each.instance.name, each.instance.slots or 1) for each in offered}
