"""Registry events (lex-llm's, in JSON): what a host says about its instances and their models.

One message carries the events of one type that a host has to tell at a time. Nothing in it may be a secret: sensitive
keys are left out of `offering`, and refused anywhere else.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from fleet_worker.errors import (
    PolicyError,
)
from fleet_worker.protocol.wire import BrokerMessage, ExtensibleModel

EventType = Literal["offering_available", "offering_unavailable", "offering_degraded", "offering_heartbeat"]

READINESS = "provider-readiness"
"""The model of an event about an instance as a whole."""
GONE = "gone"
"""The status of what is not offered any more: routers forget it."""

_SENSITIVE = frozenset(
    {
        *("access_key", "api_key", "authorization", "bearer", "client_secret", "credential", "credentials"),
        *("endpoint", "endpoint_url", "password", "path", "private_key", "prompt", "reply_to"),
        *("secret", "secrets", "token", "url"),
    }
)
_SENSITIVE_ENDS = ("_key", "_secret", "_token", "_password")


class RegistryEvent(ExtensibleModel):
    """`offering` says what is offered, `health` whether it works: `{ready, status, checked, error?}`; `capacity` has
    `slots`, `running`, `tokens_per_second`, `last_token_age` (seconds); `lane` names the lanes it takes work from.
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
            PolicyError: a key outside of `offering` is one that might hold a secret; the text names its path.
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

    @property
    def instance(self) -> str:
        return str(self.offering.get("instance"))

    @property
    def model(self) -> str:
        return str(self.offering.get("model"))


class Announcement(BrokerMessage):
    """One message: what a host tells. It is to be heard from again within `interval` seconds."""

    v: Literal[1]
    host: str
    interval: float = Field(gt=0)
    events: list[RegistryEvent]


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


Status = Literal["starting", "available", "degraded", "unavailable", "drained"]
