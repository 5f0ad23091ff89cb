"""Any number of Mac minis running MLX servers, one inference service: the public names.

The errors are imported at once, all other names on first use (PEP 562): a program that only catches our errors loads
neither Celery nor kombu nor redis.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fleet_worker import errors
from fleet_worker.errors import *  # noqa: F403

if TYPE_CHECKING:
    from fleet_worker.protocol.reply import ChatResponse, Delta, EmbedResponse, Timings, Usage
    from fleet_worker.router.call import ChatStream
    from fleet_worker.router.router import Router
    from fleet_worker.settings import Instance, Model, Settings

_MODULE_OF = {
    "ChatResponse": "protocol.reply",
    "ChatStream": "router.call",
    "Delta": "protocol.reply",
    "EmbedResponse": "protocol.reply",
    "Instance": "settings",
    "Model": "settings",
    "Router": "router.router",
    "Settings": "settings",
    "Timings": "protocol.reply",
    "Usage": "protocol.reply",
}

__all__ = [
    *errors.__all__,
    "ChatResponse",
    "ChatStream",
    "Delta",
    "EmbedResponse",
    "Instance",
    "Model",
    "Router",
    "Settings",
    "Timings",
    "Usage",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("fleet_worker.version").VERSION
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fleet_worker' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fleet_worker.{_MODULE_OF[name]}"), name)
