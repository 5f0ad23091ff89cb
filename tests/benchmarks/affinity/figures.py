"""What came out of a simulation."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmarks.affinity.fleet import Fleet, Policy
from tests.benchmarks.affinity.machine import M4_PRO, Cache, EndlessCache, SequenceCache
from tests.benchmarks.affinity.policies import Affine, LeastLoaded, Pull
from tests.benchmarks.affinity.product import Product
from tests.benchmarks.affinity.workloads import SECONDS, sessions_of

MINIS, SLOTS = 8, 4
PRODUCT, PULL, AFFINE, BOUND = "product", "pull", "affine", "bound"
POLICIES: dict[str, Callable[[int], Policy]] = {
    PULL: Pull,
    AFFINE: Affine,
    PRODUCT: Product,
    BOUND: LeastLoaded,
}


@dataclass(frozen=True, slots=True)
class Figures:
    """Times are seconds to the first token."""

    p50: float
    p95: float
    mean: float
    cached: float
    """The share of all prompt tokens."""
    jain: float
    """Fairness over minis: 1 if all were busy for the same time."""
    moved: float
    """The share of requests that went from a direct lane to the shared one."""
    answered: int


def simulate(workload: str, policy: str, seed: int, routers: int, seconds: float = SECONDS) -> Figures:
    """Run a workload whose sessions begin within so many seconds, until four times that."""
    endless = EndlessCache()
    caches: list[Cache] = [endless if policy == BOUND else SequenceCache() for _ in range(MINIS)]
    policies = [POLICIES[policy](seed * 100 + number) for number in range(routers)]
    fleet = Fleet([M4_PRO] * MINIS, SLOTS, caches, policies, seed)
    return _figures(fleet.run(sessions_of(workload, seed, seconds), until=4 * seconds))


def _figures(fleet: Fleet) -> Figures:
    done = fleet.done
    waited = sorted(request.first_token - request.at for request in done)
    busy = [mini.busy for mini in fleet.minis]
    return Figures(
        p50=waited[len(waited) // 2],
        p95=waited[int(0.95 * len(waited))],
        mean=statistics.fmean(waited),
        cached=sum(request.cached for request in done) / sum(request.turn.tokens for request in done),
        jain=sum(busy) ** 2 / (len(busy) * sum(each * each for each in busy)),
        moved=sum(request.moves > 0 for request in done) / len(done),
        answered=len(done),
    )
