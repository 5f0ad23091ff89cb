"""The rule: to which node a request goes, or to the shared lane, where whoever is free takes it.

A node costs what the request and all others there have to wait for:

    prefill that is before it + wait for a slot + (1 + requests there) x its own prefill that is not cached + its answer

Own prefill counts once for each request there, since a server answers nobody while it prefills.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WORTH = 0.3
"""Seconds of prefill that a cache must save, against a node with as much as nodes hold on average."""
LONG = 2.0
"""Seconds of prefill from which a request is placed though nobody holds more of it than others. Two such in a row on
one node take much longer than on two."""
FASTER = 1.5
"""A node whose prefill or whose answers are so many times as fast is preferred while it has free slots."""
SHORT_PATIENCE = 2.0
"""Seconds that a request waits in a direct lane beyond what is expected."""
TWICE_AS_SLOW = 30_000
"""Tokens of a prompt after which another one takes twice as long to prefill (M4 and M4 Pro, Llama 8B of 4 bits)."""


class Candidate(NamedTuple):
    """A node as this router sees it now."""

    node: str
    slots: int
    busy: int
    """Requests that it has, the waiting ones included."""
    prefill_before: float
    """Seconds of prefill that a new request waits for."""
    cached: int
    """Tokens of the request's prompt that it is believed to hold."""
    prefill_speed: float
    """Tokens a second of a short prompt."""
    decode_speed: float
    """Tokens a second of a stream that runs alone."""

    @property
    def is_free(self) -> bool:
        return self.busy < self.slots


@dataclass(frozen=True, slots=True)
class Work:
    """What a request takes: tokens of its prompt, and what is usual for its model."""

    tokens: int
    answer_tokens: float
    answer_seconds: float
    """From the first token of an answer to its end."""


class Choice(NamedTuple):
    node: str | None
    """None for the shared lane."""
    cached: int
    """Tokens that are expected to be cached there; for the shared lane, at the best node."""
    prefill: float
    """Seconds of prefill that are expected there."""
    patience: float
    """Seconds that it may wait there before it is better off in the shared lane."""
    wait: float = 0.0
    """Seconds until a slot is expected to be free there."""


def choose(
    candidates: Sequence[Candidate],
    work: Work,
    mean_cached: float,
    *,
    tie: Callable[[], float],
    must: bool = False,
) -> Choice:
    """Return where a request goes. `mean_cached` is what all nodes hold of it on average, in tokens. `tie` is a random
    number that decides between nodes which are equally good.

    With `must` it is a node in any case: the cheapest. There must be at least one candidate then.
    """
    costs = {each: cost(each, work) for each in candidates}
    ranked = sorted(candidates, key=lambda each: (costs[each], each.busy, tie()))
    if not ranked:
        return Choice(None, 0, 0.0, 0.0)
    best = ranked[0]
    saved = prefill_seconds(work.tokens, mean_cached, best.prefill_speed) - own_prefill(best, work)
    if must or saved >= WORTH:
        return _to(best, work, max(saved, 0.0))
    if best.is_free and own_prefill(best, work) >= LONG:
        return _to(best, work, 0.0)
    free = [each for each in ranked if each.is_free]
    if free and any(_is_faster(free[0], each) for each in free):
        return _to(free[0], work, 0.0)
    return Choice(None, max(each.cached for each in candidates), own_prefill(best, work), 0.0)


def cost(candidate: Candidate, work: Work) -> float:
    """Return the seconds that a request costs at a node."""
    return (
        _wait(candidate, work)
        + (1 + candidate.busy) * own_prefill(candidate, work)
        + work.answer_tokens / candidate.decode_speed
    )


def own_prefill(candidate: Candidate, work: Work) -> float:
    return prefill_seconds(work.tokens, candidate.cached, candidate.prefill_speed)


def prefill_seconds(tokens: int, cached: float, speed: float) -> float:
    """Return the seconds to prefill what is not cached of a prompt: each token takes longer the more are before it. At
    least one token is always prefilled."""
    cached = min(cached, tokens - 1)
    return (tokens - cached) / speed * (1 + (tokens + cached) / 2 / TWICE_AS_SLOW)


def _wait(candidate: Candidate, work: Work) -> float:
    return candidate.prefill_before + _wait_for_slot(candidate, work)


def _wait_for_slot(candidate: Candidate, work: Work) -> float:
    over = candidate.busy + 1 - candidate.slots
    return max(0, over) * work.answer_seconds / candidate.slots


def _is_faster(one: Candidate, other: Candidate) -> bool:
    return one.prefill_speed >= FASTER * other.prefill_speed or one.decode_speed >= FASTER * other.decode_speed


def _to(best: Candidate, work: Work, saved: float) -> Choice:
    patience = _wait(best, work) + saved + SHORT_PATIENCE
    return Choice(best.node, best.cached, own_prefill(best, work), patience, _wait_for_slot(best, work))
