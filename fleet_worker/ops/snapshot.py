"""The fleet at one moment: what the hosts publish about their instances, and what waits in the lanes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fleet_worker.broker.app import create_app
from fleet_worker.broker.queue_depth import Waiting, waiting
from fleet_worker.broker.topology import direct_lane, lane, transport_of
from fleet_worker.ops.clocks import clocks_of, wrong_clocks
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.offered import Offered
from fleet_worker.registry.view import Registry
from fleet_worker.settings import Settings


@dataclass(frozen=True, slots=True)
class LaneStatus:
    lane: str
    depth: int | None
    """Waiting requests; None if the broker did not answer about this lane in time."""
    oldest_age: float | None
    """Seconds since the oldest was submitted; None if nothing waits, or if the broker does not tell (RabbitMQ)."""
    nodes: int | None
    """How many nodes consume it now; None if that is unknown (Redis, without a registry node)."""
    unserved: bool
    """Requests wait, and no node takes them."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """If there are no instances, no registry node has answered."""

    instances: list[InstanceStatus]
    models: list[Offered]
    """Sorted by model and node."""
    lanes: list[LaneStatus]
    """Unserved ones first, then by depth."""
    taken_at: float
    """time.monotonic()"""

    @property
    def wrong_clocks(self) -> dict[str, float]:
        """By host, "" for this one: by how many seconds a clock is ahead of what most clocks show."""
        return wrong_clocks(clocks_of(self.instances))

    def models_of(self, instance: InstanceStatus) -> list[Offered]:
        key = instance.host, instance.name
        return [each for each in self.models if (each.host, each.instance.name) == key]

    def token_age(self, instance: InstanceStatus) -> float | None:
        """Seconds since the instance delivered a token; None if it has delivered none yet."""
        if instance.last_token_age is None:
            return None
        return instance.last_token_age + self.taken_at - instance.heard_at

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        """Return what `fleet-worker status --json` prints. All ages are seconds."""
        wrong = self.wrong_clocks
        return {
            "instances": [self._instance(each, wrong.get(each.host, 0.0)) for each in self.instances],
            "models": [
                {
                    "model": each.model,
                    "host": each.host,
                    "instance": each.instance.name,
                    "node": each.node,
                    "ready": each.ready,
                    "capabilities": list(each.capabilities),
                    "features": list(each.features),
                    "limits": each.limits,
                }
                for each in self.models
            ],
            "lanes": [asdict(each) for each in self.lanes],
        }

    def _instance(self, instance: InstanceStatus, clock_ahead: float) -> dict[str, Any]:
        token_age = self.token_age(instance)
        return {
            "host": instance.host,
            "instance": instance.name,
            "node": instance.node,
            "status": instance.status,
            "reason": instance.reason,
            "ready": instance.ready,
            "models": [each.model for each in self.models_of(instance)],
            "lanes": list(instance.lanes),
            "slots": instance.slots,
            "used": instance.running,
            "free": instance.free,
            "tokens_per_second": instance.tokens_per_second,
            "last_token_age": None if token_age is None else round(token_age, 3),
            "prompt_tokens": instance.prompt_tokens,
            "cached_tokens": instance.cached_tokens,
            "server": instance.server,
            "server_stage": instance.server_stage,
            "server_restarts": instance.server_restarts,
            "server_deaths": instance.server_deaths,
            "server_memory": instance.server_memory,
            "version": instance.version,
            "heard_age": round(self.taken_at - instance.heard_at, 3),
            "clock_ahead": round(clock_ahead, 3),
        }


class SnapshotCollector:
    """Takes snapshots, and remembers the lanes of earlier ones: on RabbitMQ nothing else names the lanes of a host that
    is gone.
    """

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._app = create_app(settings)
        self._transport = transport_of(settings.broker_url)
        self._registry = registry
        self._lanes: set[str] = set()

    def take(self) -> Snapshot:
        """Raises `BrokerUnavailable`."""
        instances, offerings = self._registry.instances(), self._registry.offerings()
        for offered in offerings:  # also lanes that nodes have left because their MLX servers do not work
            self._lanes.update(lane(capability, offered.model) for capability in offered.capabilities)
        for instance in instances:
            self._lanes.update([direct_lane(instance.node), *instance.lanes])
        depths: dict[str, Waiting | None] = dict.fromkeys(self._lanes)
        depths.update(waiting(self._app, self._transport, self._lanes))
        return snapshot_of(instances, offerings, depths, now=time.monotonic())

    def close(self) -> None:
        self._app.close()


def snapshot_of(
    instances: list[InstanceStatus], offerings: list[Offered], depths: Mapping[str, Waiting | None], *, now: float
) -> Snapshot:
    """Combine what the registry and the broker know. `depths` is by lane; `now` is time.monotonic()."""
    lanes = [_lane(name, each, instances) for name, each in depths.items()]
    return Snapshot(
        instances=instances,
        models=sorted(offerings, key=lambda each: (each.model, each.node)),
        lanes=sorted(lanes, key=lambda each: (not each.unserved, -(each.depth or 0), each.lane)),
        taken_at=now,
    )


def _lane(name: str, found: Waiting | None, instances: list[InstanceStatus]) -> LaneStatus:
    depth, age = (found.depth, found.oldest_age) if found else (None, None)
    counts = [sum(name in instance.lanes for instance in instances)] if instances else []
    if found and found.consumers is not None:
        counts.append(found.consumers)  # may be more: hosts without a registry node
    nodes = max(counts, default=None)
    return LaneStatus(
        lane=name,
        depth=depth,
        oldest_age=None if age is None else round(age, 3),
        nodes=nodes,
        unserved=bool(depth) and nodes == 0,
    )
