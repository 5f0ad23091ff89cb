"""The fleet at one moment: what its hosts say of their instances, and what waits in its lanes.

`dataclasses.asdict` of a snapshot is what `fleet-worker status --json` prints. All ages are float seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fleet_worker.broker.app import create_app
from fleet_worker.broker.queue_depth import Waiting, waiting
from fleet_worker.broker.topology import direct_lane, lane, transport_of
from fleet_worker.registry.view import InstanceState, Offered, Registry
from fleet_worker.settings import Settings


@dataclass(frozen=True, slots=True)
class SeenInstance:
    """`status` is available, degraded, unavailable, starting or drained."""

    host: str
    instance: str
    node: str
    status: str
    reason: str
    """Why it is not available; empty if it is."""
    ready: bool
    models: list[str]
    lanes: list[str]
    """Those that it takes work from now."""
    slots: int
    used: int
    free: int
    tokens_per_second: float
    last_token_age: float | None
    """Since it delivered a token; None if it has not yet."""
    server: str
    version: str
    heard_age: float
    """Since its host was heard; the figures are as old as that."""


@dataclass(frozen=True, slots=True)
class SeenModel:
    """One model of one instance."""

    model: str
    host: str
    instance: str
    node: str
    ready: bool
    capabilities: list[str]
    features: list[str]
    limits: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SeenLane:
    lane: str
    depth: int | None
    """Requests that wait; None if the broker was not asked about this lane in time."""
    oldest_age: float | None
    """Since the oldest of them was submitted; None if there is none, or the broker does not tell (RabbitMQ)."""
    nodes: int | None
    """How many take work from it now; None if nobody knows (Redis, without a registry node)."""
    unserved: bool
    """Requests wait, and no node takes them."""

    @property
    def direct(self) -> bool:
        """It is of one node only."""
        return self.lane.startswith(direct_lane(""))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Without any instances, no registry node was heard."""

    instances: list[SeenInstance]
    models: list[SeenModel]
    lanes: list[SeenLane]
    """Those first that nobody serves, then by depth."""


class SnapshotCollector:
    """Takes snapshots. It remembers the lanes that it has seen: on RabbitMQ those of a host that has just died are
    known from nowhere else.
    """

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._app = create_app(settings)
        self._transport = transport_of(settings.broker_url)
        self._registry = registry
        self._seen: set[str] = set()

    def take(self) -> Snapshot:
        """Raises `BrokerUnavailable`."""
        instances, offerings = self._registry.instances(), self._registry.offerings()
        self._seen.update(_lanes_of(instances, offerings))
        held: dict[str, Waiting | None] = dict.fromkeys(self._seen)
        held.update(waiting(self._app, self._transport, self._seen))
        return snapshot_of(instances, offerings, held, now=time.monotonic())

    def close(self) -> None:
        self._app.close()


def _lanes_of(instances: Iterable[InstanceState], offerings: Iterable[Offered]) -> Iterator[str]:
    """Also those that their nodes have left, since their servers do not work."""
    for offered in offerings:
        yield from (lane(capability, offered.model) for capability in offered.capabilities)
    for instance in instances:
        yield direct_lane(instance.node)
        yield from instance.lanes


def snapshot_of(
    instances: list[InstanceState],
    offerings: list[Offered],
    held: Mapping[str, Waiting | None],
    *,
    now: float,
) -> Snapshot:
    """Put together what the registry and the broker say; `now` is monotonic seconds."""
    models = sorted((_model(each) for each in offerings), key=lambda seen: (seen.model, seen.node))
    lanes = [_lane(name, each, instances) for name, each in held.items()]
    return Snapshot(
        instances=[_instance(each, models, now) for each in instances],
        models=models,
        lanes=sorted(lanes, key=lambda seen: (not seen.unserved, -(seen.depth or 0), seen.lane)),
    )


def _instance(state: InstanceState, models: list[SeenModel], now: float) -> SeenInstance:
    heard_age = now - state.heard_at
    return SeenInstance(
        host=state.host,
        instance=state.name,
        node=state.node,
        status=state.status,
        reason=state.reason,
        ready=state.ready,
        models=[seen.model for seen in models if (seen.host, seen.instance) == (state.host, state.name)],
        lanes=list(state.lanes),
        slots=state.slots,
        used=state.running,
        free=max(0, state.slots - state.running),
        tokens_per_second=state.tokens_per_second,
        last_token_age=None if state.last_token_age is None else round(state.last_token_age + heard_age, 3),
        server=state.server,
        version=state.version,
        heard_age=round(heard_age, 3),
    )


def _model(offered: Offered) -> SeenModel:
    return SeenModel(
        model=offered.model,
        host=offered.host,
        instance=offered.instance.name,
        node=offered.node,
        ready=offered.ready,
        capabilities=list(offered.capabilities),
        features=list(offered.features),
        limits=offered.limits,
    )


def _lane(name: str, held: Waiting | None, instances: list[InstanceState]) -> SeenLane:
    depth, age = (held.depth, held.oldest_age) if held else (None, None)
    nodes = _nodes(name, held, instances)
    return SeenLane(
        lane=name,
        depth=depth,
        oldest_age=None if age is None else round(age, 3),
        nodes=nodes,
        unserved=bool(depth) and nodes == 0,
    )


def _nodes(name: str, held: Waiting | None, instances: list[InstanceState]) -> int | None:
    """As the registry says, or more if the broker counts more: a host may have no registry node."""
    counts = [sum(name in instance.lanes for instance in instances)] if instances else []
    if held and held.consumers is not None:
        counts.append(held.consumers)
    return max(counts, default=None)
