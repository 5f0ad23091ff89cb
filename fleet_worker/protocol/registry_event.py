"""Registry events: what a host publishes about its instances and their models. The fields are those of lex-llm.

One message has all events of one type that a host publishes at that moment. Sensitive keys are left out of `offering`,
and refused everywhere else.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, TypeAdapter

from fleet_worker.errors import PolicyError
from fleet_worker.protocol.status import InstanceStatus, ModelStatus, Name
from fleet_worker.protocol.wire import BrokerMessage, ExtensibleModel

EventType = Literal["offering_available", "offering_unavailable", "offering_degraded", "offering_heartbeat"]

READINESS = "provider-readiness"
"""The model name in events about an instance itself."""
GONE = "gone"
"""The status of an instance or a model that is not offered any more: routers forget it."""
WHOLE_STATUS = b"{}"
"""The question of a router for the status of a host, as it is sent to all. Hosts of version 0.1 answer whatever comes
with their status."""
MODEL_MISSING = "the MLX server does not have this model"

_SENSITIVE = frozenset(
    {
        *("access_key", "api_key", "authorization", "bearer", "client_secret", "credential", "credentials"),
        *("endpoint", "endpoint_url", "password", "path", "private_key", "prompt", "reply_to"),
        *("secret", "secrets", "token", "url"),
    }
)
_SENSITIVE_ENDS = ("_key", "_secret", "_token", "_password")


class RegistryEvent(ExtensibleModel):
    """`offering` is what is offered; `health` is `{ready, status, checked, error?}`; `capacity` has `slots`, `running`,
    `tokens_per_second`, `last_token_age` and `status_age` (seconds), and what is known about the prompt cache; `lane`
    lists the lanes that the node consumes.
    """

    event_id: str
    event_type: EventType
    occurred_at: str
    offering: dict[str, Any]
    runtime: dict[str, Any]
    capacity: dict[str, Any]
    health: dict[str, Any]
    lane: list[str] = Field(default=[])
    metadata: dict[str, Any] = Field(default={})

    @classmethod
    def of(cls, event_type: EventType, *, offering: dict[str, Any], **rest: Any) -> RegistryEvent:
        """Return a new event that happened now.

        Raises:
            PolicyError: a key outside of `offering` may hold a secret; the text names its path.
        """
        for name, value in rest.items():
            for path in _sensitive_paths(name, value):
                raise PolicyError(f"a registry event must not have {path}")
        return cls(
            event_id=str(uuid.uuid4()),
            event_type=event_type,
            occurred_at=datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            offering=_without_sensitive(offering),
            **rest,
        )

    @classmethod
    def about(
        cls, instance: InstanceStatus, model: ModelStatus | None = None, *, known: str | None = None
    ) -> RegistryEvent:
        """Return an event about an instance, or about one of its models.

        It is a heartbeat if its status is the `known` one, which was published last.
        """
        status = (model or instance).status
        reason = MODEL_MISSING if model and status != instance.status else instance.reason
        live = instance.pid is not None
        runtime: dict[str, Any] = {"node": instance.node, "host": instance.host, "version": instance.version}
        capacity: dict[str, Any] = {"slots": instance.slots, "running": instance.running}
        if instance.status_age is not None:
            capacity["status_age"] = instance.status_age
        if instance.server_stage:
            runtime |= {"server_stage": instance.server_stage, "server_deaths": instance.server_deaths}
            capacity["server_memory"] = instance.server_memory
        if live:
            runtime |= {"server": instance.server, "pid": instance.pid}
            if instance.process:
                runtime["process"] = instance.process
            if instance.server_restarts is not None:
                runtime["server_restarts"] = instance.server_restarts
            capacity["tokens_per_second"] = instance.tokens_per_second
            capacity["last_token_age"] = instance.last_token_age
            capacity |= _of_cache(instance)
        return cls.of(
            "offering_heartbeat" if status == known else _TYPES.get(status, "offering_unavailable"),
            offering=_offering(instance, model),
            runtime=runtime,
            capacity=capacity,
            health={"ready": status == "available", "status": status, "checked": live}
            | ({"error": reason} if reason else {}),
            lane=list(instance.lanes),
            metadata={"extension": "fleet_worker", "configured": status != GONE, "live": live},
        )

    @property
    def instance(self) -> str:
        return str(self.offering.get("instance"))

    @property
    def model(self) -> str:
        return str(self.offering.get("model"))

    @property
    def status(self) -> str:
        return str(self.health.get("status", "unavailable"))

    def instance_status(self, host: str, *, heard_at: float, expires_at: float) -> InstanceStatus:
        """The inverse of `about`. Missing fields get defaults: other versions, and other programs, publish less."""
        known = {"host": host, "name": self.instance, "status": self.status, "reason": self.health.get("error", "")}
        times = {"heard_at": heard_at, "expires_at": expires_at, "clock_ahead": self._clock_ahead}
        return _INSTANCE.validate_python({**self.runtime, **self.capacity, **known, "lanes": self.lane, **times})

    @property
    def _clock_ahead(self) -> float | None:
        """Events are sent at once. Hosts whose clocks differ from each other are found by it (`ops.clocks`)."""
        try:
            occurred_at = datetime.fromisoformat(self.occurred_at)
        except ValueError:
            return None
        return None if occurred_at.tzinfo is None else (occurred_at - datetime.now(UTC)).total_seconds()

    def model_status(self, *, expires_at: float) -> ModelStatus:
        return _MODEL.validate_python({**self.offering, "status": self.status, "expires_at": expires_at})


class Announcement(BrokerMessage):
    """One message: events of one host. The next one about the same instances or models follows within `interval`
    seconds.
    """

    v: Literal[1]
    host: Name
    interval: float = Field(gt=0)
    events: list[RegistryEvent]


_INSTANCE, _MODEL = TypeAdapter(InstanceStatus), TypeAdapter(ModelStatus)
_TYPES: dict[str, EventType] = {"available": "offering_available", "degraded": "offering_degraded"}


def _of_cache(instance: InstanceStatus) -> dict[str, Any]:
    """What is known about the prompt cache. Nodes of older versions, and servers that tell nothing, have less."""
    counts = {"prompt_tokens": instance.prompt_tokens, "cached_tokens": instance.cached_tokens}
    troubles = [asdict(each) for each in instance.cache_troubles]
    known = {name: count for name, count in counts.items() if count is not None}
    return {**known, "cache_troubles": troubles} if troubles else known


def _offering(instance: InstanceStatus, model: ModelStatus | None) -> dict[str, Any]:
    offering: dict[str, Any] = {"provider": "mlx", "instance": instance.name}
    if model is None:
        return {**offering, "model": READINESS, "usage": "inference"}
    return {
        **offering,
        "model": model.model,
        "usage": "embedding" if model.capabilities == ("embed",) else "inference",
        "capabilities": list(model.capabilities),
        "features": list(model.features),
        "limits": model.limits,
    }


def _is_sensitive(key: str) -> bool:
    name = re.sub(r"[^a-z0-9]+", "_", key.lower())
    return name in _SENSITIVE or name.endswith(_SENSITIVE_ENDS)


def _sensitive_paths(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if _is_sensitive(str(key)):
                yield f"{path}.{key}"
            yield from _sensitive_paths(f"{path}.{key}", inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _sensitive_paths(f"{path}.{number}", inner)


def _without_sensitive(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_sensitive(inner) for key, inner in value.items() if not _is_sensitive(str(key))}
    if isinstance(value, list | tuple):
        return [_without_sensitive(inner) for inner in value]
    return value
