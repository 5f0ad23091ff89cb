"""What GET requests ask for: models, health, the usage of a key. Nothing of it costs a mini anything."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway import health, models
from fleet_worker.gateway.json_text import compact
from fleet_worker.gateway.keys import Keys
from fleet_worker.gateway.known_fleet import KnownFleet
from fleet_worker.gateway.ledger_file import files_of
from fleet_worker.gateway.problems import only
from fleet_worker.gateway.request import Request
from fleet_worker.gateway.response import Response
from fleet_worker.gateway.running import Running
from fleet_worker.gateway.usage import key_usage, moment

ALIVE = ("/", "/health", "/health/liveliness", "/health/liveness")
FOUND = (*ALIVE, "/health/readiness", "/models", "/usage")


class Lookups:
    """Answers them. `ledger` is the file of this gateway; those of others on this host are beside it."""

    def __init__(self, fleet: KnownFleet, running: Running, keys: Keys, ledger: Path) -> None:
        self._fleet = fleet
        self._running = running
        self._keys = keys
        self._ledger = ledger

    def has(self, path: str) -> bool:
        return path in FOUND or path.startswith("/models/")

    async def answer(self, path: str, request: Request, response: Response) -> None:
        if request.method not in ("GET", "HEAD"):
            raise only("GET, HEAD")
        status, found = await self._found(path, request)
        await response.whole(status, compact(found).encode("ascii"))

    async def _found(self, path: str, request: Request) -> tuple[int, dict[str, Any]]:
        if path in ALIVE:
            return 200, {"status": "alive"}
        if path == "/health/readiness":
            return health.readiness(self._fleet.registry, draining=self._running.draining)
        key = self._keys.find(request.secret)
        if path == "/usage":
            since = _since(request)
            return 200, await asyncio.to_thread(key_usage, files_of(self._ledger), key.name, since)
        if path == "/models":
            return 200, models.page(self._fleet.known(), key)
        return 200, models.details(self._fleet.known(), key, path.removeprefix("/models/"))


def _since(request: Request) -> float:
    """Return the time from which usage is asked for, as in `?since=7d`: by default the begin of this day in UTC."""
    (text, *_) = parse_qs(request.query).get("since", [""])
    try:
        return moment(text) if text else time.time() // 86_400 * 86_400
    except ValueError as error:
        raise InvalidRequest(f"since: {error}", param="since") from None
