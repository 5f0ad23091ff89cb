"""Which nodes may take a request, by the registry: facts that may be a quarter of a second old."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from fleet_worker.protocol.request import FleetRequest
from fleet_worker.registry.view import Registry
from fleet_worker.router.affinity.choose import FASTER
from fleet_worker.router.affinity.load import NodeLoad

FACTS_FOR = 0.25
"""Seconds for which the nodes of a lane are not looked up again: with a thousand of them it takes some milliseconds."""
MOST_LANES = 1_000
PREFILL_SPEED, DECODE_SPEED = 400.0, 30.0
"""Tokens a second while no node has measured any."""


@dataclass(frozen=True, slots=True)
class LaneNodes:
    """The ready nodes of one model and operation, in random order."""

    at: float
    loads: tuple[NodeLoad, ...]
    names: frozenset[str]
    classes: tuple[tuple[NodeLoad, ...], ...]
    """The same nodes; those of a class are about equally fast, the fastest come first."""
    prefill_speed: float
    decode_speed: float
    """The median speeds, for nodes that have not measured theirs."""

    @property
    def slowest_prefill(self) -> float:
        return min((each.prefill_speed or self.prefill_speed for each in self.loads), default=self.prefill_speed)


class Lanes:
    """Looks up the nodes of lanes. Not thread-safe."""

    def __init__(self, registry: Registry, load_of: Callable[[str], NodeLoad]) -> None:
        self._registry = registry
        self._load_of = load_of
        self._known: dict[tuple[str, str], LaneNodes] = {}

    def nodes_for(self, request: FleetRequest, now: float) -> LaneNodes:
        key = request.model, request.operation
        lane = self._known.get(key)
        if lane is None or now >= lane.at + FACTS_FOR:
            if len(self._known) >= MOST_LANES:
                self._known.clear()
            lane = self._known[key] = self._looked_up(*key, now)
        return lane

    def prefill_speed_of(self, model: str) -> float:
        """Return the median speed of the nodes that serve a model, as it was looked up last."""
        speeds = (lane.prefill_speed for (name, _), lane in self._known.items() if name == model)
        return next(speeds, PREFILL_SPEED)

    def _looked_up(self, model: str, operation: str, now: float) -> LaneNodes:
        loads = []
        for offered in self._registry.offerings(model=model, capability=operation, ready=True):
            load = self._load_of(offered.node)
            load.tell_of_registry(offered.instance.slots, offered.instance.running, offered.instance.heard_at)
            if not load.is_silent(now):
                loads.append(load)
        random.shuffle(loads)
        prefill = _median([each.prefill_speed for each in loads], PREFILL_SPEED)
        decode = _median([each.decode_speed for each in loads], DECODE_SPEED)
        return LaneNodes(
            at=now,
            loads=tuple(loads),
            names=frozenset(each.name for each in loads),
            classes=_by_speed(loads, prefill, decode),
            prefill_speed=prefill,
            decode_speed=decode,
        )


def _median(known: list[float | None], otherwise: float) -> float:
    return statistics.median([speed for speed in known if speed] or [otherwise])


def _by_speed(loads: list[NodeLoad], prefill: float, decode: float) -> tuple[tuple[NodeLoad, ...], ...]:
    """Return the nodes in classes: nobody is `FASTER` times as fast as another of its class, in decode or prefill."""
    by_decode = _classes(loads, lambda load: load.decode_speed or decode)
    return tuple(
        tuple(part) for each in by_decode for part in _classes(each, lambda load: load.prefill_speed or prefill)
    )


def _classes(loads: list[NodeLoad], speed: Callable[[NodeLoad], float]) -> list[list[NodeLoad]]:
    classes: list[list[NodeLoad]] = []
    for load in sorted(loads, key=speed, reverse=True):
        if classes and speed(classes[-1][0]) < FASTER * speed(load):
            classes[-1].append(load)
        else:
            classes.append([load])
    return classes
