"""Which nodes may take a request, by the registry: facts that may be a quarter of a second old."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
class SpeedClass:
    """Nodes that are about equally fast. Smaller differences between measured speeds say more about the requests."""

    loads: tuple[NodeLoad, ...]
    """In random order."""
    prefill_speed: float
    decode_speed: float
    """Tokens a second: the medians of what they measured."""


@dataclass(frozen=True, slots=True)
class LaneNodes:
    """The ready nodes of one model and operation."""

    at: float
    classes: tuple[SpeedClass, ...]
    names: frozenset[str]
    prefill_speed: float
    """The median of all, in tokens a second."""

    @property
    def loads(self) -> Iterator[NodeLoad]:
        return itertools.chain.from_iterable(each.loads for each in self.classes)


class Lanes:
    """Looks up the nodes of lanes. Not thread-safe."""

    def __init__(
        self, registry: Registry, load_of: Callable[[str], NodeLoad], shuffle: Callable[[list[Any]], None]
    ) -> None:
        self._registry = registry
        self._shuffle = shuffle
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
        self._shuffle(loads)  # of equally good ones the first is taken
        prefill = _median([each.prefill_speed for each in loads], PREFILL_SPEED)
        decode = _median([each.decode_speed for each in loads], DECODE_SPEED)
        names = frozenset(each.name for each in loads)
        return LaneNodes(now, tuple(_by_speed(loads, prefill, decode)), names, prefill)


def _median(known: Iterable[float | None], otherwise: float) -> float:
    return statistics.median([speed for speed in known if speed] or [otherwise])


def _by_speed(loads: list[NodeLoad], prefill: float, decode: float) -> Iterator[SpeedClass]:
    """Yield the nodes in classes, in none of which one is `FASTER` times as fast as another, in decode or prefill.
    Nodes that have not measured their speeds get these."""
    for by_decode in _classes(loads, lambda load: load.decode_speed or decode):
        for each in _classes(by_decode, lambda load: load.prefill_speed or prefill):
            speed = _median((load.prefill_speed for load in each), prefill)
            yield SpeedClass(tuple(each), speed, _median((load.decode_speed for load in each), decode))


def _classes(loads: list[NodeLoad], speed: Callable[[NodeLoad], float]) -> list[list[NodeLoad]]:
    """Return the nodes in classes, the fastest first, and in a class in the order in which they were given."""
    limits: list[float] = []
    for each in sorted(map(speed, loads), reverse=True):
        if not limits or each * FASTER <= limits[-1]:
            limits.append(each)
    classes: list[list[NodeLoad]] = [[] for _ in limits]
    for load in loads:
        classes[sum(speed(load) <= limit for limit in limits[1:])].append(load)
    return classes
