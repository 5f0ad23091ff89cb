"""Requests with an idempotency key: the same request is not generated twice."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.in_flight import InFlightRequest
from fleet_worker.router.reply_buffer import ReplyBuffer

MAX_ANSWERS = 1_000
MAX_CHARACTERS = 64 * 1024 * 1024
"""Of all answers that are kept; a vector of 1,024 numbers has 5,464."""


class IdempotencyCache:
    """Requests by their key: in flight, and for `ttl` seconds after they were answered."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._lock = threading.RLock()
        self._requests: OrderedDict[str, tuple[bytes, InFlightRequest]] = OrderedDict()
        self._sizes: dict[str, int] = {}
        """Characters of each answer."""

    def join(self, request: FleetRequest, *target: object) -> tuple[InFlightRequest, ReplyBuffer] | None:
        """Return the request that has the same key, with a buffer for one more reader; None if there is none, or if it
        failed. `target` is what else must be the same: the node, and `on_interrupt`.

        Raises:
            InvalidRequest: the key belongs to a different request.
        """
        fingerprint = _fingerprint(request, target)
        with self._lock:
            self._evict()
            known, found = self._requests.get(request.idempotency_key, (fingerprint, None))
            if known != fingerprint:
                raise InvalidRequest(
                    "the idempotency_key belongs to a different request: its operation, model, instance, node, body or "
                    "on_interrupt is not the same",
                    param="idempotency_key",
                )
            buffer = found and found.join(request.timeout_seconds)
            return (found, buffer) if found and buffer else None

    def add(self, started: InFlightRequest, *target: object) -> tuple[InFlightRequest, ReplyBuffer] | None:
        """Let others join this request. If one with its key was added meanwhile, join that one instead and return it
        as `join` does."""
        with self._lock:
            joined = self.join(started.request, *target)
            if joined is None:
                self._requests[started.request.idempotency_key] = _fingerprint(started.request, target), started
            return joined

    def _evict(self) -> None:
        """Drop failed requests at once, and answers that are too old or too many; keep what is in flight."""
        answers = characters = 0
        for key, (_, request) in reversed(tuple(self._requests.items())):
            if request.ended_at is None:
                continue
            if key not in self._sizes:
                self._sizes[key] = request.pack()
            answers, characters = answers + 1, characters + self._sizes[key]
            too_old = time.monotonic() - request.ended_at > self._ttl
            if too_old or not request.answered or answers > MAX_ANSWERS or characters > MAX_CHARACTERS:
                del self._requests[key], self._sizes[key]


def _fingerprint(request: FleetRequest, target: tuple[object, ...]) -> bytes:
    """Return a hash of everything that makes a difference to the answer."""
    parts = [request.operation, request.model, request.provider_instance, request.params.model_dump(), *target]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
