"""Which way an attempt goes: to the shared lane, or to the direct lane of one node."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from fleet_worker.errors import QueueTimeout
from fleet_worker.mlx.parameters import may_be_refused, refused_parameter, unsupported
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.request import FleetRequest, Operation
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry import absence
from fleet_worker.registry.offered import fits
from fleet_worker.registry.view import Registry

COUNTED_FOR = 0.25
"""Seconds for which slots are not counted again: in a fleet of a thousand nodes that takes a millisecond."""
MOST_COUNTED = 1_000
OWNERS_NEED = 60.0
"""Seconds after which another try may be worth it, if the owners of all machines need them."""


class _Counted(NamedTuple):
    at: float
    slots: int
    context_window: int | None
    is_there: bool
    """One of them is ready, or takes work later by itself."""
    is_known: bool
    """There is one, ready or not."""


@dataclass(frozen=True, slots=True)
class WhyWaiting:
    """Why no node takes a request now."""

    text: str
    away_for: float | None
    """What `Registry.away_for` returns."""
    is_known: bool = False
    """The hosts of all nodes that could take it tell that these are not ready."""
    by_owner: bool = False
    """The owners of all machines that could do it need them."""

    @property
    def metadata(self) -> dict[str, Any]:
        """For the error that ends the request."""
        by_owner = {"by_owner": True, "retry_after": OWNERS_NEED} if self.by_owner else {}
        return {"away_for": self.away_for, **by_owner}


class NodeSelection:
    """Chooses where an attempt goes, by the present view of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: dict[tuple[str, str, str, str | None], _Counted] = {}
        self._ready: dict[tuple[str, str], tuple[float, frozenset[str]]] = {}

    def node_for(self, request: FleetRequest, failed: Collection[str] = ()) -> str | None:
        """Return None to use the shared lane (the default).

        Return a node if the caller asked for an instance, or if a node that failed this request (`failed`) also
        consumes the lane. Choose at random, weighted by slots. If no other node is ready, use the lane all the same;
        but a request for an instance waits for a node of that instance. A node whose server cannot do what a parameter
        asks for counts as failed.
        """
        wanted, failed = request.provider_instance, {*failed, *self.unable(request)}
        if wanted == "any":
            ready = self._nodes(request, ready=True) if failed else {}
            return _choose(ready.keys() - failed, ready)
        nodes = self._nodes(request)
        candidates = {node for node, (instance, _) in nodes.items() if instance == wanted}
        ready_ones = candidates & self._nodes(request, ready=True).keys()
        return _choose((ready_ones - failed) or ready_ones or candidates, nodes)

    def require_able(self, request: FleetRequest, node: str | None) -> None:
        """Raise `UnsupportedParameter` if no server that may take this request can do what a parameter asks for."""
        if unable := self._unable(request, temperature=0.0):
            wanted, nodes = request.provider_instance, self._nodes(request)
            allowed = {each for each, (name, _) in nodes.items() if wanted in ("any", name) and node in (None, each)}
            if allowed and allowed <= unable.keys():
                raise unsupported(unable[min(allowed)], "no server that offers this model does")

    def unable(self, request: FleetRequest) -> set[str]:
        """Return the nodes whose servers may not be able to do what a parameter asks for."""
        return set(self._unable(request, temperature=1.0))

    def ready(self, model: str, operation: Operation) -> frozenset[str]:
        """Return the nodes that can do this now. The answer may be `COUNTED_FOR` old: each request that waits in a
        direct lane asks once a second."""
        at, nodes = self._ready.get((model, operation), (-math.inf, frozenset()))
        if time.monotonic() >= at + COUNTED_FOR:
            if len(self._ready) >= MOST_COUNTED:
                self._ready.clear()
            nodes = frozenset(
                each.node for each in self._registry.offerings(model=model, capability=operation, ready=True)
            )
            self._ready[model, operation] = time.monotonic(), nodes
        return nodes

    def seen(self, node: str) -> InstanceStatus | None:
        """Return what its host has said last about a node."""
        return self._registry.instance(node)

    def is_ready(self, request: FleetRequest, node: str) -> bool:
        """Return whether this node could take the request now; as old as that of `ready`."""
        return node in self.ready(request.model, request.operation)

    def waits_in_vain(self, request: FleetRequest, node: str) -> bool:
        """Return whether this node is not ready, while another node could take the request."""
        ready, wanted = self._nodes(request, ready=True), request.provider_instance
        return node not in ready and (wanted == "any" or any(wanted == instance for instance, _ in ready.values()))

    def slots(self, model: str, operation: Operation, instance: str, node: str | None) -> int:
        """Return the slots of all ready instances that may take such a request. The answer may be `COUNTED_FOR` old."""
        return self._counted(model, operation, instance, node).slots

    def context_window(self, request: FleetRequest, node: str | None) -> int | None:
        """Return the largest context window of those that may take this request; None if that of one is unknown. The
        answer may be `COUNTED_FOR` old."""
        return self._counted(request.model, request.operation, request.provider_instance, node).context_window

    def require_soon(self, request: FleetRequest, node: str | None, max_wait: float | None) -> None:
        """Raise `QueueTimeout` if no node has been ready for this request for more than `max_wait` seconds."""
        if max_wait is None or self.slots(request.model, request.operation, request.provider_instance, node):
            return
        why = self.why_waiting(request, node)
        if why.away_for and why.away_for > max_wait:
            text = f"{why.text}, and the request may wait {max_wait:g} s (max_wait)"
            raise QueueTimeout(text, **why.metadata)

    def require_there(self, request: FleetRequest, node: str | None, longest: float) -> None:
        """Raise `QueueTimeout` if the owners of all machines that could do this need them; or if no instance there was
        ready in the last `longest` seconds. Nothing is refused before all hosts can have told."""
        if self.may_be_there(request, node) or not self._registry.is_settled:
            return
        why = self.why_waiting(request, node)
        if why.by_owner or (why.is_known and (why.away_for or 0.0) > longest):
            raise QueueTimeout(f"no node can take the request now: {why.text}", **why.metadata)

    def may_be_there(self, request: FleetRequest, node: str | None, *, is_served: bool = False) -> bool:
        """Return whether a node that may take this request is ready, starts or works, or nothing is known of any. The
        answer may be `COUNTED_FOR` old.

        A node of which no host tells may have lost its registry node. It is there as long as it works on other requests
        of that lane, which `is_served` tells."""
        counted = self._counted(request.model, request.operation, request.provider_instance, node)
        return counted.is_there or (is_served and not counted.is_known) or not self._registry.has_heard

    def why_waiting(self, request: FleetRequest, node: str | None) -> WhyWaiting:
        """Return why no node takes this request, or not this `node`."""
        what, wanted = node or f"{request.operation} of that model", request.provider_instance
        away_for = self._registry.away_for(request.model, request.operation, wanted, node)
        offered = self._registry.offerings(model=request.model, capability=request.operation)
        fitting = [each for each in offered if fits(each.instance, wanted, node)]
        if away_for is None:
            return WhyWaiting(f"no host reports a node for {what}", None)
        if away_for == 0:
            return WhyWaiting(f"{what} is served, but its nodes are busy or cut off", 0.0)
        text = f"nobody has served {what} for {away_for:.0f} s"
        is_known = absence.is_absent(fitting)
        return WhyWaiting(
            f"{text} ({absence.described(fitting)})" if is_known else text,
            round(away_for, 3),
            is_known,
            by_owner=absence.are_away(fitting),
        )

    def _counted(self, model: str, operation: Operation, instance: str, node: str | None) -> _Counted:
        key = model, operation, instance, node
        counted = self._known.get(key)
        if counted is None or time.monotonic() >= counted.at + COUNTED_FOR:
            if len(self._known) >= MOST_COUNTED:
                self._known.clear()
            offered = self._registry.offerings(model=model, capability=operation)
            fitting = [each for each in offered if fits(each.instance, instance, node)]
            slots = sum(each.instance.slots or 1 for each in fitting if each.ready)
            windows = [each.limits.get("context_window") for each in fitting]
            known = [window for window in windows if isinstance(window, int)]
            window = max(known) if known and len(known) == len(windows) else None
            is_there = any(each.ready or absence.takes_work_later(each) for each in fitting)
            counted = self._known[key] = _Counted(time.monotonic(), slots, window, is_there, bool(fitting))
        return counted

    def _unable(self, request: FleetRequest, *, temperature: float) -> dict[str, str]:
        """Return the nodes whose servers cannot do what a parameter asks for, with the name of that parameter.

        `temperature` is taken for that of a request that names none: only the nodes know what their models have then.
        """
        params = request.params
        if not isinstance(params, ChatParams) or not may_be_refused(params):
            return {}
        temperature = temperature if params.temperature is None else params.temperature
        offered = self._registry.offerings(model=request.model, capability=request.operation)
        refused = {each.node: refused_parameter(params, each.instance.server, temperature) for each in offered}
        return {node: parameter for node, parameter in refused.items() if parameter}

    def _nodes(self, request: FleetRequest, ready: bool | None = None) -> dict[str, tuple[str, int]]:
        """Return instance and slots of each node that consumes the lane of this request, now or when it is ready."""
        offered = self._registry.offerings(model=request.model, capability=request.operation, ready=ready)
        return {each.node: (each.instance.name, each.instance.slots or 1) for each in offered}


def _choose(candidates: Collection[str], nodes: dict[str, tuple[str, int]]) -> str | None:
    """Return one of the candidates; None if there is none, or if every node is one."""
    if not candidates or len(candidates) == len(nodes):
        return None
    return random.choices(list(candidates), [nodes[node][1] for node in candidates])[0]  # noqa: S311 - not a secret
