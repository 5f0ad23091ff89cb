"""Which nodes may take a request, by the registry: facts that may be a quarter of a second old."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fleet_worker.protocol.cache_digest import USUAL_PREFILL_SPEED
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.registry.view import Registry
from fleet_worker.router.affinity.choose import FASTER, WORTH, Candidate, Work, prefill_seconds
from fleet_worker.router.affinity.load import NodeLoad

FACTS_FOR = 0.25
"""Seconds for which the nodes of a lane are not looked up again: with a thousand of them it takes some milliseconds."""
MOST_LANES = 1_000
SILENT_AFTER = 5.0
"""Seconds without a digest after which a node that ran something is not chosen: its host may be gone."""
LEAST_BUSY = 3
"""Nodes that are considered of those which hold nothing of a prompt."""
MOST_HOLDERS = 32
"""Nodes that are considered of those which hold equally much of it."""
DECODE_SPEED = 30.0
"""Tokens a second of an answer, while no node has measured any."""


@dataclass(frozen=True, slots=True)
class SpeedClass:
    """Nodes that are about equally fast. Smaller differences between measured speeds say more about the requests."""

    loads: tuple[NodeLoad, ...]
    """In random order."""
    prefill_speed: float
    decode_speed: float
    """Tokens a second: the medians of what they measured."""

    def candidate(self, load: NodeLoad, cached: int, now: float) -> Candidate:
        busy, before = load.busy(now), load.prefill_before(now)
        return Candidate(load.name, load.slots, busy, before, cached, self.prefill_speed, self.decode_speed)


@dataclass(frozen=True, slots=True)
class LaneNodes:
    """The ready nodes of one model and operation."""

    at: float
    classes: tuple[SpeedClass, ...]
    names: frozenset[str]

    @property
    def loads(self) -> Iterator[NodeLoad]:
        return itertools.chain.from_iterable(each.loads for each in self.classes)

    def mean(self, cached: Mapping[str, int]) -> float:
        """Return how many tokens a node has cached on average; `cached` names those that have any."""
        return sum(cached.values()) / max(1, len(self.names))

    def is_even_for(self, work: Work) -> bool:
        """Return whether no choice saves anything: the prompt is short, and all nodes are about equally fast."""
        if len(self.classes) != 1:
            return not self.classes
        return prefill_seconds(work.tokens, 0, self.classes[0].prefill_speed) < WORTH

    def candidates(self, cached: Mapping[str, int], without: Collection[str], now: float) -> list[Candidate]:
        """Return the nodes that may be the cheapest: of those that are equally fast, and have equally many tokens of a
        prompt cached, the least busy ones."""
        candidates = []
        for speed in self.classes:
            by_cached: dict[int, list[NodeLoad]] = {}
            for load in speed.loads:
                if load.name not in without:
                    by_cached.setdefault(cached.get(load.name, 0), []).append(load)
            for tokens, loads in by_cached.items():
                most = MOST_HOLDERS if tokens else LEAST_BUSY
                least_busy = heapq.nsmallest(most, loads, key=lambda load: load.busy(now))
                candidates += [speed.candidate(load, tokens, now) for load in least_busy]
        return candidates


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

    def _looked_up(self, model: str, operation: str, now: float) -> LaneNodes:
        loads = []
        for offered in self._registry.offerings(model=model, capability=operation, ready=True):
            load = self._load_of(offered.node)
            load.tell_of_registry(offered.instance.slots, offered.instance.running, offered.instance.heard_at)
            if not (load.is_running and load.is_silent(now, SILENT_AFTER)):
                loads.append(load)
        self._shuffle(loads)  # of equally good ones the first is taken
        prefill = _median([each.prefill_speed for each in loads], USUAL_PREFILL_SPEED)
        decode = _median([each.decode_speed for each in loads], DECODE_SPEED)
        names = frozenset(each.name for each in loads)
        return LaneNodes(now, tuple(_by_speed(loads, prefill, decode)), names)


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
