"""How many requests wait in the lanes of a router."""

from __future__ import annotations

from celery import Celery

from fleet_worker.lanes import Transport

__all__ = ["Backlog"]


class Backlog:
    """Not looked at yet: everything is admitted."""

    def __init__(self, app: Celery, transport: Transport, *, max_waiting: int) -> None: ...

    def admit(self, lane: str) -> None: ...

    def accepted(self, lane: str, queue_wait: float) -> None: ...

    def depth(self, lane: str, timeout: float = 1.0) -> int | None:
        return None

    def close(self) -> None: ...
