"""What a router calls: where a request goes, and what becomes of it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fleet_worker.broker.door import Refused
from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.cache_digest import USUAL_PREFILL_SPEED, CacheDigest, DigestMessage
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.reply import CacheOutcome, Usage
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.registry.view import Registry
from fleet_worker.router.affinity.choose import Work, choose, prefill_seconds
from fleet_worker.router.affinity.index import CacheIndex
from fleet_worker.router.affinity.lanes import LaneNodes, Lanes
from fleet_worker.router.affinity.lengths import Lengths
from fleet_worker.router.affinity.load import NodeLoad
from fleet_worker.router.affinity.outcome import outcome_of
from fleet_worker.router.affinity.prefixes import prefixes_of

MOST_NODES = 20_000
"""Nodes whose digests are taken: anybody who may use the broker may send some."""
MOST_MODELS = 1_000
"""Models whose lengths are known; beyond that they are learned anew."""
FORGOTTEN_AFTER = 120.0
"""Seconds without a digest after which a node that the registry does not know is forgotten."""
SWEEP_EVERY = 30.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an attempt goes, and why."""

    node: str | None
    """None for the shared lane."""
    prefixes: PromptPrefixes
    model: str = ""
    tokens: int = 0
    """Of the prompt, as far as this can be known before."""
    expected: int = 0
    """Tokens that are believed to be cached there; for the shared lane, at the warmest node."""
    best: int = 0
    """Tokens that are believed to be cached at the warmest node."""
    prefill: float = 0.0
    """Seconds of prefill that are expected there."""
    wait: float = 0.0
    """Seconds until a slot is expected to be free there."""
    patience: float = 0.0
    """Seconds that it may wait there before it is better off in the shared lane."""


@dataclass(slots=True)
class _InFlight:
    placement: Placement
    at: str | None
    """The node whose load counts it."""
    accepted: bool = False
    held: int = 0
    """Tokens that the node which accepted it was believed to have cached."""
    first_token_at: float | None = None


class Affinity:
    """Places requests where their prompts are cached. Thread-safe; no method waits for the broker.

    `key` is that of all hashes: the same one for all routers of a fleet (`prefixes.fleet_key`).
    """

    def __init__(
        self,
        registry: Registry,
        *,
        key: bytes,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._rng = rng or random.Random()  # noqa: S311 - no secret: it decides between equally good nodes
        self._registry = registry
        self._key = key
        self._clock = clock
        self._lock = threading.Lock()
        self._index = CacheIndex()
        self._loads: dict[str, NodeLoad] = {}
        self._lanes = Lanes(registry, self._load_of, self._rng.shuffle)
        self._lengths: dict[str, Lengths] = {}
        self._in_flight: dict[str, _InFlight] = {}
        self._next_sweep = 0.0

    # --- What nodes tell ---

    def receive(self, body: bytes) -> list[CacheDigest]:
        """Learn what the nodes of one host hold and do, and return that; raises `Refused` if it is no such message."""
        try:
            message = DigestMessage.decode(body)
        except InvalidRequest:
            raise Refused("it is no digest of a registry node") from None
        with self._lock:
            now = self._clock()
            self._sweep(now)
            for digest in message.digests:
                self._learn(digest, message.interval, now)
        return message.digests

    def holders(self, prefixes: PromptPrefixes) -> dict[str, int]:
        """Return for each node that holds a part of this prompt how many bytes of it."""
        with self._lock:
            return self._index.match(prefixes)

    def warms(self, node: str, prefixes: PromptPrefixes) -> None:
        """Note that a node has begun to read a prompt, or has read it, for no request of a caller."""
        with self._lock:
            self._index.send(node, prefixes, self._clock())

    def _learn(self, digest: CacheDigest, interval: float, now: float) -> None:
        if digest.node not in self._loads and len(self._loads) >= MOST_NODES:
            return
        load = self._load_of(digest.node)
        if load.epoch not in (None, digest.epoch):
            self._index.empty(digest.node)
        load.tell(digest, interval, now)
        self._index.tell(digest.node, digest.held, now)

    # --- A request, in the order in which it happens ---

    def prefixes(self, request: FleetRequest, session: str | None = None, scope: str | None = None) -> PromptPrefixes:
        """Return the ids of a prompt (`prefixes.prefixes_of`)."""
        return prefixes_of(request, self._key, session, scope)

    def place(
        self, request: FleetRequest, prefixes: PromptPrefixes, failed: Collection[str] = (), *, blamed: bool = False
    ) -> Placement:
        """Return where an attempt goes. After a failure it is always a node, the cheapest of those that are ready and
        did not fail: the shared lane only if there is none.

        A request that is `blamed`, since an instance died with it, goes to no node that holds its whole prompt if there
        is another one: it may be the cache that killed the instance.
        """
        with self._lock:
            now = self._clock()
            lane = self._lanes.nodes_for(request, now)
            work = self._work_of(request, prefixes)
            must = bool(failed) or blamed
            if not must and lane.is_even_for(work):
                best = self._index.most_held(prefixes, lane.names) * work.tokens // max(1, prefixes.size)
                return Placement(None, prefixes, request.model, work.tokens, expected=best, best=best)
            cached = self._cached(prefixes, work, lane)
            candidates = lane.candidates(cached, failed, now)
            if blamed:
                candidates = [each for each in candidates if each.cached < work.tokens] or candidates
            choice = choose(candidates, work, lane.mean(cached), tie=self._rng.random, must=must)
        return Placement(
            node=choice.node,
            prefixes=prefixes,
            model=request.model,
            tokens=work.tokens,
            expected=choice.cached,
            best=max(cached.values(), default=0),
            prefill=choice.prefill,
            wait=choice.wait,
            patience=choice.patience,
        )

    def sent(self, request_id: str, placement: Placement) -> None:
        """Note that an attempt is sent: the first one, or another one after a failure or a move."""
        with self._lock:
            self._leave(request_id)
            self._in_flight[request_id] = _InFlight(placement, placement.node, held=placement.expected)
            if placement.node is not None:
                self._load_of(placement.node).send(request_id, placement.prefill, accepted=False)

    def accepted(self, request_id: str, node: str) -> None:
        """Note that a node has accepted it."""
        with self._lock:
            request = self._in_flight.get(request_id)
            if request is None:
                return
            load, placement, now = self._load_of(node), request.placement, self._clock()
            request.accepted = True
            if request.at == node:
                load.accept(request_id)
            else:
                self._leave(request_id)
                request.at, request.held = node, self._tokens_held(node, placement)
                speed = load.prefill_speed or USUAL_PREFILL_SPEED
                load.send(request_id, prefill_seconds(placement.tokens, request.held, speed), accepted=True)
            self._index.send(node, placement.prefixes, now)

    def first_token(self, request_id: str) -> None:
        """Note that its answer has begun."""
        with self._lock:
            request = self._in_flight.get(request_id)
            if request is not None and request.first_token_at is None:
                request.first_token_at = self._clock()
                if request.at is not None:
                    self._load_of(request.at).first_token(request_id)

    def ended(self, request_id: str, usage: Usage | None, node: str | None) -> CacheOutcome | None:
        """Forget a request that ended, and learn from the usage of its answer; None for one that failed.

        Return how its prompt met the caches; None if it failed, or its server does not tell what was cached.
        """
        with self._lock:
            request = self._in_flight.get(request_id)
            self._leave(request_id)
            if request is None:
                return None
            del self._in_flight[request_id]
            if usage is None:
                return None
            now = self._clock()
            seconds = None if request.first_token_at is None else now - request.first_token_at
            self._lengths_of(request.placement.model).learn(request.placement.prefixes.size, usage, seconds)
            if node is None or not request.accepted:
                return None
            # Whatever the server had in its cache before, it has this prompt now.
            self._index.send(node, request.placement.prefixes, now)
            held = request.held if node == request.at else 0
            return outcome_of(usage, best=request.placement.best, held=held, tokens=request.placement.tokens)

    # --- What a router asks about a request that waits in a direct lane ---

    def has_free_slots(self, node: str) -> bool:
        """Return whether a node told last that it has a free slot."""
        with self._lock:
            load = self._loads.get(node)
            return load is not None and load.heard_at is not None and load.told_free

    def is_silent(self, node: str, seconds: float) -> bool:
        """Return whether no digest of a node has come for `seconds`, and for longer than there are between two."""
        with self._lock:
            load = self._loads.get(node)
            return load is not None and load.is_silent(self._clock(), seconds)

    def another_is_free(self, request: FleetRequest, node: str) -> bool:
        """Return whether another node that may take the request has a free slot."""
        with self._lock:
            now = self._clock()
            lane = self._lanes.nodes_for(request, now)
            return any(each.busy(now) < each.slots for each in lane.loads if each.name != node)

    # --- Inside ---

    def _work_of(self, request: FleetRequest, prefixes: PromptPrefixes) -> Work:
        lengths = self._lengths_of(request.model)
        most = request.params.max_tokens if isinstance(request.params, ChatParams) else None
        answer_tokens = min(lengths.answer_tokens, most or lengths.answer_tokens)
        return Work(lengths.tokens(prefixes.size), answer_tokens, lengths.answer_seconds)

    def _cached(self, prefixes: PromptPrefixes, work: Work, lane: LaneNodes) -> dict[str, int]:
        """Return for each node of a lane that holds a part of this prompt how many tokens of it."""
        held = self._index.match(prefixes)
        return {node: size * work.tokens // prefixes.size for node, size in held.items() if node in lane.names}

    def _tokens_held(self, node: str, placement: Placement) -> int:
        size = placement.prefixes.size
        return placement.tokens * self._index.held_by(node, placement.prefixes) // size if size else 0

    def _leave(self, request_id: str) -> None:
        request = self._in_flight.get(request_id)
        if request is not None and request.at is not None:
            self._load_of(request.at).end(request_id)

    def _load_of(self, node: str) -> NodeLoad:
        load = self._loads.get(node)
        if load is None:
            load = self._loads[node] = NodeLoad(node)
        return load

    def _lengths_of(self, model: str) -> Lengths:
        lengths = self._lengths.get(model)
        if lengths is None:
            if len(self._lengths) >= MOST_MODELS:
                self._lengths.clear()
            lengths = self._lengths[model] = Lengths()
        return lengths

    def _sweep(self, now: float) -> None:
        """Forget the nodes that are gone, with all that they held."""
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_EVERY
        known = {instance.node for instance in self._registry.instances()}
        known |= {request.at for request in self._in_flight.values() if request.at is not None}
        known |= {name for name, load in self._loads.items() if (load.heard_at or 0.0) > now - FORGOTTEN_AFTER}
        self._loads = {name: load for name, load in self._loads.items() if name in known}
        self._index.sweep(known, now)
