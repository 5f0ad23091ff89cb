"""Which way an attempt takes: its lane, where whoever is free takes it, or the direct lane of one node."""

from __future__ import annotations

import random
from collections.abc import Collection

from fleet_worker.protocol.request import FleetRequest
from fleet_worker.registry.view import Registry


class NodeSelection:
    """Decides by what the registry says at the moment."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def node_for(self, request: FleetRequest, failed: Collection[str] = ()) -> str | None:
        """Return the node that this attempt should go to, as it failed on these already; None for its lane.

        The lane is best, but not if somebody takes from it who has just failed, or who is not of the instance that is
        asked for. While there is nobody else, the lane is all there is; but who asks for an instance waits for that.
        Who has more slots is chosen more often.
        """
        wanted = request.provider_instance
        if wanted == "any":
            ready = self._nodes(request, ready=True) if failed else {}
            return _one_of(ready.keys() - failed, ready)
        nodes = self._nodes(request)
        fit = {node for node, (instance, _) in nodes.items() if instance == wanted}
        there = fit & self._nodes(request, ready=True).keys()
        return _one_of((there - set(failed)) or there or fit, nodes)

    def waits_in_vain(self, request: FleetRequest, node: str) -> bool:
        """Is this node not there to take it, while somebody else may be?"""
        ready, wanted = self._nodes(request, ready=True), request.provider_instance
        return node not in ready and (wanted == "any" or any(wanted == instance for instance, _ in ready.values()))

    def _nodes(self, request: FleetRequest, ready: bool | None = None) -> dict[str, tuple[str, int]]:
        """Return who takes from the lane of this request, now or when it is ready: its instance and slots, by node."""
        offered = self._registry.offerings(model=request.model, capability=request.operation, ready=ready)
        return {each.node: (each.instance.name, each.instance.slots or 1) for each in offered}


def _one_of(fit: Collection[str], nodes: dict[str, tuple[str, int]]) -> str | None:
    """One of those who fit, or None if there is none of them, or nobody but them."""
    if not fit or len(fit) == len(nodes):
        return None
    return random.choices(list(fit), [nodes[node][1] for node in fit])[0]  # noqa: S311 - it spreads load
