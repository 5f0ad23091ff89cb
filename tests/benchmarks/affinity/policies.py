"""What the product is compared with: the shared lane alone, and the rule as it was first simulated, which knows the
speeds of all minis, and the tokens of each prompt and answer."""

from __future__ import annotations

import random
from math import inf

from tests.benchmarks.affinity.fleet import Fleet, Mini, Request
from tests.benchmarks.affinity.workloads import Chain

WORTH, LONG = 0.3, 2.0
KEPT_FOR, MOST_SENT = 900.0, 4_000


class Pull:
    """Everything goes to the shared lane. It keeps count of what this router has where."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._at: dict[int, int] = {}

    def join(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.load = [0] * len(fleet.minis)

    def route(self, request: Request) -> tuple[int | None, float]:
        return None, inf

    def may_move(self, request: Request) -> bool:
        return False

    def moved(self, request: Request) -> None: ...

    def accepted(self, request: Request) -> None:
        if request.lane is None and request.node is not None:
            self._charge(request, request.node)

    def began(self, request: Request) -> None: ...

    def ended(self, request: Request) -> None:
        self.load[self._at.pop(id(request))] -= 1

    def told(self, mini: Mini) -> None: ...

    def _charge(self, request: Request, node: int) -> None:
        self._at[id(request)] = node
        self.load[node] += 1


class LeastLoaded(Pull):
    """The direct lane of the mini with the fewest requests of this router."""

    def route(self, request: Request) -> tuple[int | None, float]:
        node = min(range(len(self.load)), key=lambda number: (self.load[number], self._rng.random()))
        self._charge(request, node)
        return node, inf


class Affine(Pull):
    """A request whose prompt some minis hold goes where it costs the fleet least: the prefill that is before it there,
    and its own as often as there are requests that wait for it to end. If that saves less than `WORTH` seconds against
    the mean mini, it goes to the shared lane; unless it takes `LONG` even so, and the mini has a free slot."""

    def join(self, fleet: Fleet) -> None:
        super().join(fleet)
        self._sent: list[dict[str, float]] = [{} for _ in fleet.minis]
        self._told: list[set[str]] = [set() for _ in fleet.minis]
        self._said: list[tuple[float, int, float]] = [(-inf, 0, 0.0)] * len(fleet.minis)
        """By mini: when it told so last, requests that ran, seconds of prefill."""
        self._prefills: list[dict[int, float]] = [{} for _ in fleet.minis]
        self._answer_seconds = 5.0

    def route(self, request: Request) -> tuple[int | None, float]:
        nodes = range(len(self.fleet.minis))
        found = [self._match(node, request.turn.chain) for node in nodes]
        needs = [self._needs(request, node, found[node]) for node in nodes]
        cost = [self._wait(node) + (1 + self._busy(node)) * needs[node] for node in nodes]
        best = min(nodes, key=lambda node: (cost[node], self._busy(node), self._rng.random()))
        saves = self._needs(request, best, sum(found) // len(nodes)) - needs[best]
        is_full = self._busy(best) >= self.fleet.minis[best].slots
        if saves < WORTH and (is_full or needs[best] < LONG):
            return None, inf
        request.expected = found[best]
        self._prefills[best][id(request)] = needs[best]
        self._charge(request, best)
        return best, inf

    def accepted(self, request: Request) -> None:
        assert request.node is not None
        if request.lane is None:
            known = self._match(request.node, request.turn.chain)
            self._prefills[request.node][id(request)] = self._needs(request, request.node, known)
        super().accepted(request)
        self._add(request.node, request.turn.chain)

    def began(self, request: Request) -> None:
        for each in self._prefills:
            each.pop(id(request), None)

    def ended(self, request: Request) -> None:
        assert request.node is not None
        super().ended(request)
        self._answer_seconds += 0.1 * (request.ended - request.first_token - self._answer_seconds)
        if request.cached < 0.5 * request.expected:
            for id_, length in request.turn.chain:
                if length > request.cached:
                    self._sent[request.node].pop(id_, None)
                    self._told[request.node].discard(id_)
        self._add(request.node, request.turn.answered)

    def told(self, mini: Mini) -> None:
        self._told[mini.number] = mini.believed.compact()
        self._said[mini.number] = self.fleet.now, mini.running, mini.prefill_left(self.fleet.now)

    def _match(self, node: int, chain: Chain) -> int:
        sent, told = self._sent[node], self._told[node]
        since = max(self.fleet.now - KEPT_FOR, self._said[node][0] - 0.05)
        for id_, length in reversed(chain):
            if id_ in told or sent.get(id_, -inf) >= since:
                return length
        return 0

    def _add(self, node: int, chain: Chain) -> None:
        sent = self._sent[node]
        for id_, _ in chain:
            sent.pop(id_, None)
            sent[id_] = self.fleet.now
        for id_ in list(sent)[:-MOST_SENT]:
            del sent[id_]

    def _needs(self, request: Request, node: int, cached: int) -> float:
        tokens = request.turn.tokens
        return self.fleet.minis[node].speed.prefill(tokens, min(cached, tokens - 1))

    def _busy(self, node: int) -> int:
        at, running, _ = self._said[node]
        return max(self.load[node], running if self.fleet.now - at < 30.0 else 0)

    def _wait(self, node: int) -> float:
        at, _, left = self._said[node]
        slots = self.fleet.minis[node].slots
        before = max(sum(self._prefills[node].values()), left - (self.fleet.now - at))
        return before + max(0, self._busy(node) + 1 - slots) * self._answer_seconds / slots
