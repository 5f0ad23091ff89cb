"""The fleet as a simulation of discrete events: lanes, minis that pull, routers that choose lanes.

Times are seconds of the simulated clock.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

from fleet_worker.node.prompt_cache.prefills import Prefills
from fleet_worker.node.prompt_cache.shadow import Shadow
from fleet_worker.node.prompt_cache.speeds import PeakSpeed
from tests.benchmarks.affinity.machine import SEQUENCES, Cache, SequenceCache, Speed
from tests.benchmarks.affinity.workloads import BYTES_PER_TOKEN, Session, Turn

HOP = 0.004
"""From a publish to the task that runs, and from a frame to the router."""
DIGEST_EVERY = 1.0
LOOKS_AGAIN = 1.0
PREFILL_STEP = 2048
"""While anything is prefilled, the others get one token for each such step (mlx_lm)."""
MEASURABLE = 256
"""Tokens of prefill that tell a speed."""


@dataclass(slots=True, eq=False)
class Request:
    turn: Turn
    session: Session
    number: int
    router: int
    at: float
    node: int | None = None
    """The mini that runs it."""
    lane: int | None = None
    """The mini whose direct lane it waits in; None for the shared lane."""
    sent: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    cached: int = 0
    expected: int = 0
    """What its router expected to be cached there."""
    attempt: int = 0
    moves: int = 0
    left: float = 0.0
    """Seconds of prefill, then tokens, still to do."""
    alone: bool = False


class Policy(Protocol):
    """A router: it knows what it sent, what came back, and what minis tell."""

    def join(self, fleet: Fleet) -> None: ...

    def route(self, request: Request) -> tuple[int | None, float]:
        """Return whose direct lane a request goes to, None for the shared lane, and how long it may wait there."""

    def may_move(self, request: Request) -> bool:
        """Return whether one that has waited so long should go to the shared lane."""

    def moved(self, request: Request) -> None: ...

    def accepted(self, request: Request) -> None: ...

    def began(self, request: Request) -> None: ...

    def ended(self, request: Request) -> None: ...

    def told(self, mini: Mini) -> None: ...


class Mini:
    """One node: it runs as many requests as it has slots. Prefills share the machine equally."""

    def __init__(self, number: int, slots: int, speed: Speed, cache: Cache, clock: Callable[[], float]) -> None:
        self.number, self.slots, self.speed, self.cache = number, slots, speed, cache
        self.shadow = Shadow(SEQUENCES)
        self.believed = SequenceCache(SEQUENCES, 1 << 60)
        """What a node would believe that knew the ids of answers, too: for the rule that it is compared with."""
        self.prefill_speed, self.decode_speed = PeakSpeed(), PeakSpeed()
        self.reading = Prefills(clock)
        self.direct: deque[tuple[Request, int]] = deque()
        self.prefills: list[Request] = []
        self.decodes: list[Request] = []
        self.turn = 0
        self.version = 0
        self.busy = 0.0
        self.told_at = -inf
        self.tells = False
        self._since = 0.0

    @property
    def running(self) -> int:
        return len(self.prefills) + len(self.decodes)

    @property
    def is_free(self) -> bool:
        return self.running < self.slots

    def advance(self, now: float) -> None:
        """Do what was to do since the last time."""
        elapsed, self._since = now - self._since, now
        self.busy += elapsed if self.running else 0.0
        for request in self.prefills:
            request.left -= elapsed / len(self.prefills)
        tokens = elapsed / self._token_time() if self.decodes else 0.0
        for request in self.decodes:
            request.left -= tokens

    def next_end(self) -> float:
        """Return the seconds until something ends, if nothing begins."""
        ends = [request.left * len(self.prefills) for request in self.prefills]
        if self.decodes:
            ends.append(min(request.left for request in self.decodes) * self._token_time())
        return max(0.0, min(ends)) if ends else inf

    def prefill_left(self, now: float) -> float:
        self.advance(now)
        return sum(request.left for request in self.prefills)

    def _token_time(self) -> float:
        step = self.speed.step(len(self.decodes), sum(each.turn.tokens + each.turn.output / 2 for each in self.decodes))
        return step + (self.speed.a * PREFILL_STEP if self.prefills else 0.0)


class Fleet:
    """Runs sessions to their end. `policies` has one policy for each router."""

    def __init__(
        self, speeds: Sequence[Speed], slots: int, caches: Sequence[Cache], policies: Sequence[Policy], seed: int
    ) -> None:
        self.now = 0.0
        self.minis = [
            Mini(number, slots, *each, lambda: self.now) for number, each in enumerate(zip(speeds, caches, strict=True))
        ]
        self.shared: deque[tuple[Request, int]] = deque()
        self.done: list[Request] = []
        self._policies = policies
        self._rng = random.Random(seed)
        self._count = itertools.count()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._turns = deque(range(len(speeds)))
        """The mini that has waited longest for the shared lane is served first (BRPOP, basic.consume)."""
        for policy in policies:
            policy.join(self)

    def run(self, sessions: Iterable[Session], until: float) -> Fleet:
        for session in sessions:
            self._at(session.at, self._ask, session, 0)
        while self._events:
            self.now, _, do, given = heapq.heappop(self._events)
            if self.now > until:
                break
            do(*given)
        return self

    def _at(self, when: float, do: Callable[..., None], *given: Any) -> None:
        heapq.heappush(self._events, (when, next(self._count), do, given))

    # --- Routers ---

    def _ask(self, session: Session, number: int) -> None:
        router = self._rng.randrange(len(self._policies))
        request = Request(session.turns[number], session, number, router, at=self.now, sent=self.now, attempt=1)
        request.lane, patience = self._policies[router].route(request)
        self._at(self.now + HOP, self._arrive, request, request.attempt)
        if request.lane is not None and patience < inf:
            self._at(self.now + HOP + patience, self._move, request, request.attempt)

    def _move(self, request: Request, attempt: int) -> None:
        """It was not taken in time: send it to the shared lane, if another mini is free; else look again."""
        if request.attempt != attempt or request.node is not None:
            return
        if self.shared or not self._policies[request.router].may_move(request):
            self._at(self.now + LOOKS_AGAIN, self._move, request, attempt)
            return
        request.moves += 1
        request.attempt += 1
        request.lane, request.sent = None, self.now
        self._policies[request.router].moved(request)
        self._at(self.now + HOP, self._arrive, request, request.attempt)

    # --- Lanes ---

    def _arrive(self, request: Request, attempt: int) -> None:
        if request.lane is None:
            self.shared.append((request, attempt))
            self._offer()
        else:
            mini = self.minis[request.lane]
            mini.direct.append((request, attempt))
            self._pull(mini)

    def _offer(self) -> None:
        """The shared lane has something: a mini with a free slot takes it, each in its turn."""
        while self.shared:
            taker = next((number for number in self._turns if self.minis[number].is_free), None)
            if taker is None:
                return
            self._pull(self.minis[taker])

    def _pull(self, mini: Mini) -> None:
        while mini.is_free and (request := self._take(mini)):
            self._turns.remove(mini.number)
            self._turns.append(mini.number)
            self._start(mini, request)

    def _take(self, mini: Mini) -> Request | None:
        lanes = [mini.direct, self.shared]
        for lane in lanes if mini.turn % 2 == 0 else reversed(lanes):
            while lane:
                request, attempt = lane.popleft()
                if request.attempt == attempt and request.node is None:
                    mini.turn += 1
                    return request
        return None

    # --- Minis ---

    def _start(self, mini: Mini, request: Request) -> None:
        mini.advance(self.now)
        turn = request.turn
        request.node, request.started, request.alone = mini.number, self.now, not mini.running
        request.cached = min(mini.cache.match(turn.chain), turn.tokens - 1)
        request.left = mini.speed.prefill(turn.tokens, request.cached)
        if request.cached < mini.believed.match(turn.chain):
            mini.believed.forget(turn.chain, request.cached)
        for other in [*mini.prefills, *mini.decodes]:
            other.alone = False
        mini.prefills.append(request)
        unread = turn.tokens - mini.shadow.match(turn.prefixes) / BYTES_PER_TOKEN
        mini.reading.began(id(request), unread / (mini.prefill_speed.value or 400.0))
        self._tell_later(mini)
        self._policies[request.router].accepted(request)
        self._plan(mini)

    def _plan(self, mini: Mini) -> None:
        mini.version += 1
        if (seconds := mini.next_end()) < inf:
            self._at(self.now + seconds, self._advance, mini, mini.version)

    def _advance(self, mini: Mini, version: int) -> None:
        """Something has ended there."""
        if version != mini.version:
            return
        mini.advance(self.now)
        for request in [each for each in mini.prefills if each.left <= 1e-6]:
            self._begin_answer(mini, request)
        for request in [each for each in mini.decodes if each.left <= 1e-6]:
            self._end(mini, request)
        self._pull(mini)
        self._plan(mini)

    def _begin_answer(self, mini: Mini, request: Request) -> None:
        turn = request.turn
        mini.prefills.remove(request)
        mini.decodes.append(request)
        mini.reading.ended(id(request))
        request.first_token = self.now + HOP
        request.left = float(max(1, turn.output - 1))
        if (read := turn.tokens - request.cached) >= MEASURABLE:
            mini.prefill_speed.measured(read, self.now - request.started, alone=request.alone)
        mini.cache.prefilled(turn.chain)
        mini.believed.prefilled(turn.chain)
        mini.shadow.prefilled(turn.prefixes)
        self._tell_later(mini)
        self._policies[request.router].began(request)

    def _end(self, mini: Mini, request: Request) -> None:
        turn = request.turn
        mini.decodes.remove(request)
        request.ended = self.now + HOP
        mini.decode_speed.measured(turn.output, request.ended - request.first_token, alone=request.alone)
        mini.cache.answered(turn.answered)
        mini.believed.answered(turn.answered)
        if 2 * request.cached * BYTES_PER_TOKEN < mini.shadow.match(turn.prefixes):
            mini.shadow.forget(turn.prefixes, request.cached * BYTES_PER_TOKEN)
        mini.shadow.answered(turn.prefixes)
        self.done.append(request)
        self._policies[request.router].ended(request)
        self._tell_later(mini)
        following = request.number + 1
        if following < len(request.session.turns):
            self._at(request.ended + request.session.turns[following].pause, self._ask, request.session, following)

    def _tell_later(self, mini: Mini) -> None:
        """Tell all routers what it has: on a change, and every `DIGEST_EVERY` while it runs something."""
        if not mini.tells:
            mini.tells = True
            self._at(max(self.now + 0.02, mini.told_at + DIGEST_EVERY), self._tell, mini)

    def _tell(self, mini: Mini) -> None:
        mini.tells, mini.told_at = False, self.now
        for policy in self._policies:
            policy.told(mini)
        if mini.running:
            self._tell_later(mini)
