"""Which settings a running inference node can follow, and which need a new process."""

from __future__ import annotations

from typing import Any

from fleet_worker.instance_settings import OF_MANAGED_SERVER
from fleet_worker.settings import NOT_OF_NODES, Settings


def can_follow(settings: Settings, old: Settings, name: str) -> bool:
    """Return whether a running node of this instance can follow these settings without a new process."""
    instance = settings.instances.get(name)
    return instance is not None and instance.opted_in and _fixed(settings, name) == _fixed(old, name)


def _fixed(settings: Settings, name: str) -> dict[str, Any]:
    """The settings that a running node cannot change."""
    offered = {"models", "model_whitelist", "model_blacklist", "features", "fleet", "usage"}
    return {
        "instance": settings.instances[name].model_dump(exclude=offered | OF_MANAGED_SERVER),
        "settings": settings.model_dump(exclude={"instances", "features", "registry", *NOT_OF_NODES}),
    }
