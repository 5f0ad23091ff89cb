"""A task that a node has received, as Celery holds it and shows it."""

from __future__ import annotations

from typing import Any

import celery.worker.request as celery_request


class Request(celery_request.Request):  # type: ignore[misc]
    """A task as Celery's worker holds it, whose arguments no log, event, `celery inspect` or Flower shows.

    They show the lane instead, whatever the sender put into the headers: any Celery client may send tasks.
    """

    def __init__(self, message: Any, **options: Any) -> None:
        # Celery would read the body again, in the thread of the task.
        super().__init__(message, **{**options, "body": message.payload, "decoded": True})
        self._argsrepr, self._kwargsrepr = self.delivery_info["routing_key"] or "-", ""

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Return what the remote-control commands show: `active`, `reserved`, `scheduled` and `query_task`."""
        return {**super().info(safe=True), "args": "-", "kwargs": "-"}
