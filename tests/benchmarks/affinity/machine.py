"""A mini: how fast it prefills and decodes, and what its MLX server keeps of former prompts. Lengths are tokens."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Protocol

from tests.benchmarks.affinity.workloads import Chain

SEQUENCES = 10
"""The default of mlx_lm.server (`--prompt-cache-size`)."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Prefill takes `a + b * position` seconds a token: attention grows with what is before it. One step of decoding
    takes `w + k * sequences + c * (all their tokens)`, and gives one token to each sequence."""

    a: float
    b: float
    w: float
    k: float
    c: float

    def prefill(self, until: int, cached: int = 0) -> float:
        return self.a * (until - cached) + self.b * (until * until - cached * cached) / 2

    def step(self, sequences: int, tokens: float) -> float:
        return self.w + self.k * sequences + self.c * tokens


M4_PRO = Speed(a=1 / 400, b=8.2e-8, w=0.0202, k=0.002, c=6.6e-7)
"""Llama-3.1-8B of 4 bits on a Mac mini M4 Pro: 32,159 tokens prefilled at 262 tokens/s and then decoded at 23
(mlx-examples#1029); short prompts at about 400 and 45 (Rapid-MLX#567 saw 43 with a 9B)."""


class Cache(Protocol):
    def match(self, chain: Chain) -> int:
        """Return how many tokens of a prompt need no prefill."""

    def prefilled(self, chain: Chain) -> None: ...

    def answered(self, chain: Chain) -> None: ...


class SequenceCache:
    """As `LRUPromptCache` of mlx_lm 0.32: whole sequences. Any beginning of one can be used, the oldest *inserted* goes
    first (a hit refreshes nothing), and what is the beginning of a newer one is dropped."""

    def __init__(self, sequences: int = SEQUENCES, tokens: int = 160_000) -> None:
        self._most, self._most_tokens = sequences, tokens
        self._kept: OrderedDict[str, Chain] = OrderedDict()
        self._tokens = 0
        self._ids: Counter[str] = Counter()

    def match(self, chain: Chain) -> int:
        return next((length for id_, length in reversed(chain) if id_ in self._ids), 0)

    def prefilled(self, chain: Chain) -> None:
        """Keep the system prompt, which is the first boundary."""
        self._insert(chain[:1])

    def answered(self, chain: Chain) -> None:
        self._insert(chain)

    def forget(self, chain: Chain, above: int) -> None:
        """For a node's belief: its server had no more than so many tokens of this."""
        gone = {id_ for id_, length in chain if length > above}
        for tip, kept in list(self._kept.items()):
            if any(id_ in gone for id_, _ in kept):
                self._drop(tip)

    def compact(self) -> set[str]:
        """Return what is enough to find the sequences: the first boundary, the last three, and where two part."""
        ids = {id_ for id_, count in self._ids.items() if count > 1}
        for chain in self._kept.values():
            ids.update(id_ for id_, _ in (chain[0], *chain[-3:]))
        return ids

    def _insert(self, chain: Chain) -> None:
        tip = chain[-1][0]
        if tip in self._ids and tip not in self._kept:
            return  # mlx_lm keeps it twice: no match changes
        for id_, _ in chain:
            self._drop(id_)
        self._kept[tip] = chain
        self._tokens += chain[-1][1]
        self._ids.update(id_ for id_, _ in chain)
        while len(self._kept) > self._most or (self._tokens > self._most_tokens and len(self._kept) > 1):
            self._drop(next(iter(self._kept)))

    def _drop(self, tip: str) -> None:
        chain = self._kept.pop(tip, None)
        if chain is not None:
            self._tokens -= chain[-1][1]
            self._ids -= Counter(id_ for id_, _ in chain)


class EndlessCache:
    """The bound that nobody reaches: one cache for the whole fleet, that keeps everything."""

    def __init__(self) -> None:
        self._ids: set[str] = set()

    def match(self, chain: Chain) -> int:
        return next((length for id_, length in reversed(chain) if id_ in self._ids), 0)

    def prefilled(self, chain: Chain) -> None:
        self._ids.update(id_ for id_, _ in chain)

    answered = prefilled
