"""Whether this gateway can serve: for load balancers and operators."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.known_fleet import KnownFleet


def readiness(fleet: KnownFleet, *, draining: bool) -> tuple[int, dict[str, Any]]:
    """Return an HTTP status, 200 or 503, and the JSON object that tells why."""
    if draining:
        return 503, {"status": "draining"}
    if fleet.registry is None or fleet.broker_is_away:
        return 503, {"status": "the broker is away"}
    registry = fleet.registry
    instances = registry.instances()
    ready = sum(instance.ready for instance in instances)
    if not ready:
        return 503, {"status": "no instance is ready", "instances": len(instances), "ready": 0}
    return 200, {"status": "ready", "instances": len(instances), "ready": ready, "models": registry.models(ready=True)}
