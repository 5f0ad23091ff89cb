"""What GET requests ask for: models, health, the usage of a key. None of it reaches a node."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any
from urllib.parse import parse_qs

from fleet_worker.errors import ConfigurationError, InvalidRequest
from fleet_worker.gateway import health, models
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.gateway.accounts.keys import Keys
from fleet_worker.gateway.accounts.ledger_file import files_of, path_of
from fleet_worker.gateway.accounts.usage import key_usage, moment
from fleet_worker.gateway.dialects import ollama_models
from fleet_worker.gateway.http.request import BodyMemory, Request
from fleet_worker.gateway.http.response import Response
from fleet_worker.gateway.json_text import compact
from fleet_worker.gateway.known_fleet import KnownFleet
from fleet_worker.gateway.problems import only, refuse
from fleet_worker.gateway.records import Records, shown
from fleet_worker.gateway.running import Running
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

ALIVE = ("/", "/health", "/health/liveliness", "/health/liveness")
_WAY_OUT = ": models are up to whoever operates the minis; GET /api/tags lists them"
FOUND = (*ALIVE, "/health/readiness", "/metrics", "/models", "/usage")


class Lookups:
    """Answers these requests, and those of Ollama, of which one is a POST request."""

    def __init__(
        self,
        settings: Settings,
        fleet: KnownFleet,
        running: Running,
        keys: Keys,
        bodies: BodyMemory,
        records: Records,
    ) -> None:
        self._body_timeout = settings.gateway.body_timeout
        self._ledger = path_of(settings)
        self._fleet = fleet
        self._running = running
        self._keys = keys
        self._bodies = bodies
        self._records = records

    def has(self, path: str) -> bool:
        return path in FOUND or path.startswith(("/models/", "/api/"))

    async def answer(self, path: str, request: Request, response: Response) -> None:
        if path.startswith("/api/"):
            status, found = 200, await self._of_ollama(path, request)
        elif request.method not in ("GET", "HEAD"):
            raise only("GET", "HEAD")
        elif path == "/metrics":
            text, media_type = await self._records.metrics(request, self._keys.find(request.secret))
            return await response.whole(200, text, media_type=media_type)
        else:
            status, found = await self._found(path, request)
        return await response.whole(status, compact(found).encode("ascii"))

    async def _of_ollama(self, path: str, request: Request) -> dict[str, Any]:
        key = self._keys.find(request.secret)
        body = await request.json(self._bodies, self._body_timeout) if request.method == "POST" else {}
        method = "GET" if request.method == "HEAD" else request.method
        found = ollama_models.look_up(f"{method} {path}", body, self._fleet.known(), key)
        if found is None:
            raise refuse(404, "not_found", f"{request.method} {shown(path)}: no such thing here{_WAY_OUT}")
        return found

    async def _found(self, path: str, request: Request) -> tuple[int, dict[str, Any]]:
        if path in ALIVE:
            return 200, {"status": "alive"}
        if path == "/health/readiness":
            return health.readiness(self._fleet, draining=self._running.draining)
        key = self._keys.find(request.secret)
        if path == "/usage":
            return 200, await self._usage(key, _since(request))
        if path == "/models":
            return 200, models.page(self._fleet.known(), key)
        return 200, models.details(self._fleet.known(), key, path.removeprefix("/models/"))

    async def _usage(self, key: Key, since: float) -> dict[str, Any]:
        """Return what a key has used at all gateways of this host."""
        try:
            return await asyncio.to_thread(key_usage, files_of(self._ledger), key.name, since)
        except ConfigurationError as error:
            log.error("usage is not known: %s", error.message)
            raise refuse(503, "unavailable", "the ledger cannot be read; the gateway's log tells why") from None


def _since(request: Request) -> float:
    """Return the time from which usage is asked for, as in `?since=7d`: by default the begin of this day in UTC."""
    (text, *_) = parse_qs(request.query).get("since", [""])
    try:
        return moment(text) if text else time.time() // 86_400 * 86_400
    except ValueError as error:
        raise InvalidRequest(f"since: {error}", param="since") from None
