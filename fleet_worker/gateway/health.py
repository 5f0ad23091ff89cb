"""Whether this gateway can serve: for load balancers and operators."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.known_fleet import KnownFleet
from fleet_worker.gateway.models import by_model
from fleet_worker.registry.absence import counts, is_absent


def readiness(fleet: KnownFleet, *, draining: bool) -> tuple[int, dict[str, Any]]:
    """Return an HTTP status, 200 or 503, and the JSON object that tells why.

    Anybody may ask, so of a model for which no instance is ready it tells only how many instances are in which state.
    """
    if draining:
        return 503, {"status": "draining"}
    if fleet.registry is None or fleet.broker_is_away:
        return 503, {"status": "the broker is away"}
    instances, offered = fleet.registry.instances(), by_model(fleet.registry)
    ready = sum(instance.ready for instance in instances)
    known = {"instances": len(instances), "ready": ready}
    absent = {name: counts(each) for name, each in sorted(offered.items()) if is_absent(each)}
    if not ready:
        return 503, {"status": "no instance is ready", **known, "not_ready": absent}
    models = sorted(name for name in offered if name not in absent)
    return 200, {"status": "ready", **known, "models": models, "not_ready": absent}
