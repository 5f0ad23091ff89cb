"""A router of the product in the simulated fleet: its own `Affinity`, on the simulated clock."""

from __future__ import annotations

import dataclasses
import random
from math import inf

from fleet_worker.protocol.cache_digest import CacheDigest, DigestMessage
from fleet_worker.protocol.registry_event import Announcement, RegistryEvent
from fleet_worker.protocol.reply import Usage
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.protocol.status import InstanceStatus, ModelStatus
from fleet_worker.registry.view import Registry
from fleet_worker.router.affinity.affinity import Affinity, Placement
from tests.benchmarks.affinity.fleet import DIGEST_EVERY, Fleet, Mini, Request
from tests.envelopes import envelope

DAY = 24 * 3600.0


class Product:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._placements: dict[int, Placement] = {}

    def join(self, fleet: Fleet) -> None:
        self._fleet = fleet
        registry = Registry(clock=lambda: fleet.now)
        for mini in fleet.minis:
            events = _events_of(mini)
            registry.apply(Announcement(v=1, host=_name(mini.number), interval=DAY, events=events))
        self._affinity = Affinity(registry, key=b"", clock=lambda: fleet.now, rng=self._rng)

    def route(self, request: Request) -> tuple[int | None, float]:
        placement = self._affinity.place(REQUEST, request.turn.prefixes)
        self._placements[id(request)] = placement
        self._affinity.sent(_id(request), placement)
        if placement.node is None:
            return None, inf
        return int(placement.node), placement.patience

    def may_move(self, request: Request) -> bool:
        return self._affinity.another_is_free(REQUEST, _name(request.lane))

    def moved(self, request: Request) -> None:
        placement = dataclasses.replace(self._placements[id(request)], node=None)
        self._affinity.sent(_id(request), placement)

    def accepted(self, request: Request) -> None:
        self._affinity.accepted(_id(request), _name(request.node))

    def began(self, request: Request) -> None:
        self._affinity.first_token(_id(request))

    def ended(self, request: Request) -> None:
        del self._placements[id(request)]
        turn = request.turn
        usage = Usage(prompt_tokens=turn.tokens, completion_tokens=turn.output, cached_tokens=request.cached)
        self._affinity.ended(_id(request), usage, _name(request.node))

    def told(self, mini: Mini) -> None:
        digest = CacheDigest(
            node=_name(mini.number),
            slots=mini.slots,
            running=mini.running,
            prefill_left=mini.reading.left,
            prefill_speed=mini.prefill_speed.value,
            decode_speed=mini.decode_speed.value,
            held=mini.shadow.held(),
        )
        self._affinity.receive(DigestMessage(v=1, host=digest.node, interval=DIGEST_EVERY, digests=[digest]).encode())


def _name(number: int | None) -> str:
    return f"{number:02}"


def _id(request: Request) -> str:
    return str(id(request))


def _events_of(mini: Mini) -> list[RegistryEvent]:
    name = _name(mini.number)
    instance = InstanceStatus(host=name, name="local", node=name, status="available", pid=1, slots=mini.slots)
    model = ModelStatus(model="m", capabilities=("chat", "stream_chat"), status="available")
    return [RegistryEvent.about(instance), RegistryEvent.about(instance, model)]


REQUEST = FleetRequest.build(envelope(model="m"))
"""Its prompt is not read: `place` gets the ids of a turn."""
