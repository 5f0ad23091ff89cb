"""What is recorded of each request: a line in the access log, a row in the ledger, and metrics. None of it holds text
of the request or the answer."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from fleet_worker.gateway.accounts.key import Key
from fleet_worker.gateway.accounts.ledger import Ledger
from fleet_worker.gateway.facts import Facts
from fleet_worker.gateway.http.request import Request
from fleet_worker.gateway.http.response import Response
from fleet_worker.gateway.problems import refuse

if TYPE_CHECKING:
    from fleet_worker.gateway.metrics import Metrics

access = logging.getLogger("fleet_worker.gateway.access")
READINESS = "/health/readiness"
"""It is asked again and again, above all while no instance is ready."""

_KEY = re.compile(r"sk-[\w-]+")
CLIENT_LEFT = 499
"""The status in the log and the ledger of a request whose client did not wait for its answer."""


class Records:
    """The records of one gateway. `are_quotas_shared` tells whether quotas hold for all gateways together."""

    def __init__(self, ledger: Ledger, are_quotas_shared: Callable[[], bool]) -> None:
        self._ledger = ledger
        self._metrics = _metrics(lambda: ledger.dropped, are_quotas_shared)

    def begun(self, facts: Facts, key: Key) -> None:
        """Note whose request it is."""
        facts.key = key.name
        if self._metrics:
            self._metrics.begun(key.name)

    def ended(self, request: Request, response: Response, facts: Facts) -> None:
        status = CLIENT_LEFT if facts.error == "client_left" else response.status or 0
        is_routine = request.method != "POST" and (status == 200 or request.path == READINESS)
        level = logging.DEBUG if is_routine else logging.INFO
        access.log(level, "%s %s %s %s", request.method, shown(request.path), status, facts.line(request.id))
        if facts.operation:
            if facts.key:  # a caller without a key must not fill the disk
                self._ledger.add(facts.row(request.id, facts.key, facts.operation, status))
            if self._metrics:
                self._metrics.ended(facts, status)

    async def metrics(self, request: Request, key: Key) -> tuple[bytes, bytes]:
        """Return the metrics of all keys, and their media type.

        Raises:
            Refused: this key may not read them, or the package is missing.
        """
        if not key.may_read_metrics:
            raise refuse(403, "not_allowed", "this key may not read metrics, which name all keys: may_read_metrics")
        if not self._metrics:
            raise refuse(404, "not_found", "metrics need one more package: in a checkout, pip install '.[metrics]'")
        text, media_type = await asyncio.to_thread(self._metrics.exposition, request.headers.get("accept", ""))
        return text, media_type.encode("ascii")


def _metrics(dropped: Callable[[], int], are_quotas_shared: Callable[[], bool]) -> Metrics | None:
    """Return None if the package for them is not installed."""
    try:
        from fleet_worker.gateway.metrics import Metrics
    except ModuleNotFoundError:
        return None
    return Metrics(dropped, are_quotas_shared)


def shown(path: str) -> str:
    """Return a path for a log or an error: without what looks like a key."""
    path = path[:100]
    if not path.isprintable():
        path = "".join(c if c.isprintable() else "?" for c in path)
    return _KEY.sub("sk-...", path)
