"""What the prompt cache of an MLX server is believed to hold.

The rules are those of `LRUPromptCache` in mlx_lm 0.32, which keeps whole sequences (a prompt with its answer) and can
use any beginning of one. The one that was inserted first goes first, and a hit refreshes nothing. A sequence that is
the beginning of a newer one is dropped. (mlx_lm keeps the system prompt of a cancelled request for longer. Here it is a
sequence like others: the first beginning of a prompt may be something else.)
`tests/unit/node/prompt_cache/test_shadow.py` compares both.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Container, Iterable
from dataclasses import dataclass

from fleet_worker.protocol.cache_digest import MOST_HELD
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes

Chain = tuple[tuple[str, int], ...]

EVICTED = 3
"""Evicted sequences that are remembered, for each one that is held."""
LAST = 3
"""How many of the last beginnings of each sequence are told: the last messages may be edited."""


@dataclass(slots=True)
class _Sequence:
    ids: list[str]
    session: str | None


class Shadow:
    """Holds at most `sequences` sequences; none at all if that is 0. Lengths are bytes, as in `PromptPrefixes`."""

    def __init__(self, sequences: int) -> None:
        self._most = sequences
        self._kept: OrderedDict[str, _Sequence] = OrderedDict()
        """By the id of the whole prompt, in the order of insertion."""
        self._ids: dict[str, int] = {}
        """How many sequences have each beginning."""
        self._evicted: deque[list[str]] = deque()
        self._evicted_ids: dict[str, int] = {}
        self._told: list[str] | None = None

    @property
    def room(self) -> int:
        """How many more it takes before one of them must go."""
        return self._most - len(self._kept)

    def match(self, prefixes: PromptPrefixes) -> int:
        """Return how much of this prompt is held, from its beginning."""
        return _longest(prefixes.chain, self._ids)

    def match_evicted(self, prefixes: PromptPrefixes) -> int:
        """Return how much of this prompt was held once, and was evicted since."""
        return _longest(prefixes.chain, self._evicted_ids)

    def continues(self, prefixes: PromptPrefixes) -> bool:
        """Return whether this prompt begins with all of a sequence that is held, as the next turn of a chat does."""
        return any(id_ in self._kept for id_, _ in prefixes.chain)

    def prefilled(self, prefixes: PromptPrefixes) -> None:
        """The prompt has been read. Its first beginning, the system prompt, is kept from then on, unless it was."""
        if prefixes.chain[:1] and prefixes.chain[0][0] not in self._ids:
            self._insert(prefixes.chain[:1], None)

    def answered(self, prefixes: PromptPrefixes) -> None:
        """The answer has ended. The whole prompt is kept from then on."""
        self._insert(prefixes.chain, prefixes.session)

    def forget(self, prefixes: PromptPrefixes, above: int) -> None:
        """Believe no more that anything longer than `above` of this prompt is held: the server had to read it.

        Other sequences with the same beginning stay: a model with a sliding window reuses whole sequences only.
        """
        gone = {id_ for id_, length in prefixes.chain if length > above and id_ in self._ids}
        for tip, kept in list(self._kept.items()) if gone else ():
            if tip in gone:
                self._drop(tip)
            elif not gone.isdisjoint(kept.ids):
                _take(self._ids, [id_ for id_ in kept.ids if id_ in gone])
                kept.ids = [id_ for id_ in kept.ids if id_ not in gone]
        self._told = None

    def clear(self) -> None:
        """The cache was emptied."""
        for counted in (self._kept, self._ids, self._evicted, self._evicted_ids):
            counted.clear()
        self._told = None

    def held(self) -> list[str]:
        """Return the ids that are enough to find the sequences again, those of the newest first, at most `MOST_HELD`:
        of each its session, its first beginning, the last three, and those at which others part from it."""
        if self._told is None:
            newest_first = itertools.chain.from_iterable(map(self._compact, reversed(self._kept.values())))
            self._told = list(itertools.islice(dict.fromkeys(newest_first), MOST_HELD))
        return self._told

    def _compact(self, kept: _Sequence) -> Iterable[str]:
        counts, ids = self._ids, kept.ids
        forks = (id_ for id_, after in itertools.pairwise(ids) if counts[id_] > counts[after])
        return (*filter(None, [kept.session]), *ids[:1], *ids[-LAST:], *forks)

    def _insert(self, chain: Chain, session: str | None) -> None:
        if not chain or not self._most:
            return
        ids = [id_ for id_, _ in chain]
        for tip in self._kept.keys() & ids:
            self._drop(tip)
        self._kept[ids[-1]] = _Sequence(ids, session)
        _add(self._ids, ids)
        if len(self._kept) > self._most:
            self._evict()
        self._told = None

    def _evict(self) -> None:
        ids = self._drop(next(iter(self._kept)))
        self._evicted.append(ids)
        _add(self._evicted_ids, ids)
        if len(self._evicted) > EVICTED * self._most:
            _take(self._evicted_ids, self._evicted.popleft())

    def _drop(self, tip: str) -> list[str]:
        ids = self._kept.pop(tip).ids
        _take(self._ids, ids)
        return ids


def _longest(chain: Chain, ids: Container[str]) -> int:
    return next((length for id_, length in reversed(chain) if id_ in ids), 0)


def _add(counts: dict[str, int], ids: list[str]) -> None:
    for id_ in ids:
        counts[id_] = counts.get(id_, 0) + 1


def _take(counts: dict[str, int], ids: list[str]) -> None:
    for id_ in ids:
        counts[id_] -= 1
        if not counts[id_]:
            del counts[id_]
