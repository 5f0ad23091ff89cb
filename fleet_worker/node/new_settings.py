"""Which settings a running inference node can follow, and which need a new process."""

from __future__ import annotations

from typing import Any

from fleet_worker.settings import Settings


def can_follow(settings: Settings, old: Settings, name: str) -> bool:
    """Return whether a running node of this instance can follow these settings without a new process."""
    instance = settings.instances.get(name)
    return instance is not None and instance.opted_in and _fixed(settings, name) == _fixed(old, name)


def _fixed(settings: Settings, name: str) -> dict[str, Any]:
    """The settings that a running node cannot change."""
    offered = {"models", "model_whitelist", "model_blacklist", "features", "fleet", "usage"}
    of_the_server = {"serve", "environment", "serve_timeout", "max_memory"}  # `fleet-worker up` reads them
    return {
        "instance": settings.instances[name].model_dump(exclude=offered | of_the_server),
        "settings": settings.model_dump(exclude={"instances", "features", "router", "registry"}),
    }
