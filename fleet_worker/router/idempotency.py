"""Requests with an idempotency key: what is asked again is not generated again."""

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

MOST_ANSWERS = 1_000
MOST_CHARACTERS = 64 * 1024 * 1024
"""Of all answers that are kept; a vector of 1,024 numbers has 5,464."""


class IdempotencyCache:
    """The flights with a key, while they are under way, and for `ttl` seconds after they were answered."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._lock = threading.RLock()
        self._flights: OrderedDict[str, tuple[bytes, InFlightRequest]] = OrderedDict()
        self._sizes: dict[str, int] = {}
        """Characters of each answer."""

    def join(self, request: FleetRequest, *how: object) -> tuple[InFlightRequest, ReplyBuffer] | None:
        """Join the flight that has the key of this request, if there is one that did not fail.

        `how` is what the caller wants beside the request: on which node, and what becomes of it if it breaks off.

        Raises:
            InvalidRequest: the key is that of a request for something else.
        """
        return self._join(request, _fingerprint(request, how))

    def add(self, flight: InFlightRequest, *how: object) -> tuple[InFlightRequest, ReplyBuffer] | None:
        """Let others join this flight, unless there is one to join already, which is returned."""
        asked = _fingerprint(flight.request, how)
        with self._lock:
            joined = self._join(flight.request, asked)
            if joined is None:
                self._flights[flight.request.idempotency_key] = asked, flight
            return joined

    def _join(self, request: FleetRequest, asked: bytes) -> tuple[InFlightRequest, ReplyBuffer] | None:
        with self._lock:
            self._forget()
            known, flight = self._flights.get(request.idempotency_key, (asked, None))
            if known != asked:
                raise InvalidRequest(
                    "the idempotency_key is that of a request for something else: its operation, model, instance, "
                    "node, body or on_interrupt is another one"
                )
            mailbox = flight and flight.join(request.timeout_seconds)
            return (flight, mailbox) if flight and mailbox else None

    def _forget(self) -> None:
        """Failed ones at once, answers when they are too old or too many; those under way stay."""
        answers = characters = 0
        for key, (_, flight) in reversed(tuple(self._flights.items())):
            if flight.ended_at is None:
                continue
            if key not in self._sizes:
                self._sizes[key] = flight.pack()
            answers, characters = answers + 1, characters + self._sizes[key]
            too_old = time.monotonic() - flight.ended_at > self._ttl
            if too_old or not flight.answered or answers > MOST_ANSWERS or characters > MOST_CHARACTERS:
                del self._flights[key], self._sizes[key]


def _fingerprint(request: FleetRequest, how: tuple[object, ...]) -> bytes:
    """Of all that makes a difference to the answer."""
    asked = [request.operation, request.model, request.provider_instance, request.params.model_dump(), *how]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
