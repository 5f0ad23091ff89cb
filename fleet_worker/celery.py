"""The application that `celery -A fleet_worker` finds. Nothing imports this module."""

from __future__ import annotations

import functools
from typing import Any

from celery import Celery


@functools.cache
def _app() -> Celery:
    # Only a process that may run a worker imports all that a node needs.
    from fleet_worker.node.worker import node_app

    return node_app()


def __getattr__(name: str) -> Any:
    # `celery -A fleet_worker` asks for `app`. Settings are read then, not when this module is imported.
    if name == "app":
        return _app()
    raise AttributeError(name)
