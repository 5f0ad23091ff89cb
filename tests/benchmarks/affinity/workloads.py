"""What is asked: sessions of turns. A turn is sent when the one before it is answered and its pause is over, so a slow
fleet is asked less, as by people and agents."""

from __future__ import annotations

import hashlib
import random
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fleet_worker.protocol.prompt_prefixes import PromptPrefixes

Chain = tuple[tuple[str, int], ...]
"""The ids of the beginnings of a prompt, each with its length in tokens. Equal ids mean equal beginnings."""
BYTES_PER_TOKEN = 4
SECONDS = 1800.0
"""For which sessions begin."""


@dataclass(frozen=True, slots=True)
class Turn:
    chain: Chain
    output: int
    answered: Chain
    """The chain with the answer, as the next turn repeats it."""
    pause: float
    """Seconds between the answer before it and this turn."""
    prefixes: PromptPrefixes
    """What a router makes of it."""

    @property
    def tokens(self) -> int:
        return self.chain[-1][1]


@dataclass(frozen=True, slots=True)
class Session:
    at: float
    turns: tuple[Turn, ...]


class _Prompt:
    """A prompt that grows."""

    def __init__(self) -> None:
        self.chain: Chain = ()
        self._asked: Chain = ()

    def add(self, what: object, tokens: int) -> _Prompt:
        before, length = self.chain[-1] if self.chain else ("", 0)
        digest = hashlib.blake2b(f"{before}{what}".encode(), digest_size=8).digest()
        self.chain += ((urlsafe_b64encode(digest)[:-1].decode(), length + max(1, tokens)),)
        self._asked += self.chain[-1:]
        return self

    def add_answer(self, what: object, tokens: int) -> None:
        self.add(what, tokens)
        (id_, _), (_, length) = self._asked[-2:]
        self._asked = (*self._asked[:-2], (id_, length))

    def prefixes(self) -> PromptPrefixes:
        """Return what a router makes of it (`router.affinity.prefixes`): no id for an answer."""
        chain = self._asked[:8] + self._asked[8:][-56:]
        return PromptPrefixes(chain=tuple((id_, tokens * BYTES_PER_TOKEN) for id_, tokens in chain))


def chat(rng: random.Random, name: int) -> tuple[Turn, ...]:
    """People who talk: five system prompts of 400 tokens, 6 turns of 90 + 250 tokens, 25 s to read and type."""
    start = _Prompt().add(("persona", rng.randrange(5)), 400)
    return _dialogue(rng, name, start, 1 + int(rng.expovariate(1 / 5)), 90, 250, 25)


def agent(rng: random.Random, name: int) -> tuple[Turn, ...]:
    """A coding agent: tools and rules of 12,000 tokens that all share, 8,000 of its repository, then 20 turns of 2,000
    tokens of tool output and 150 of answer, 3 s for a tool: 20,000 to 80,000 and more tokens."""
    start = _Prompt().add("tools", 12_000).add((name, "repository"), _about(rng, 8_000, 0.4))
    return _dialogue(rng, name, start, 8 + int(rng.expovariate(1 / 14)), 2_000, 150, 3)


def popular(rng: random.Random, name: int) -> tuple[Turn, ...]:
    """One application: a system prompt of 3,000 tokens, one question, one answer."""
    return _dialogue(rng, name, _Prompt().add("the application", 3_000), 1, 150, 120, 1)


def rag(rng: random.Random, name: int) -> tuple[Turn, ...]:
    """One of 60 documents of 6,000 tokens, some of them much more often than others, a question, sometimes another."""
    document = min(int(rng.paretovariate(0.7)), 60)
    start = _Prompt().add("rag", 300).add(("document", document), 6_000)
    return _dialogue(rng, name, start, 1 + (rng.random() < 0.4), 60, 200, 20)


Kind = Callable[[random.Random, int], tuple[Turn, ...]]
WORKLOADS: dict[str, dict[Kind, float]] = {
    "chat": {chat: 0.28},
    "agents": {agent: 0.012},
    "popular": {popular: 4.0},
    "rag": {rag: 0.65},
    "mix": {chat: 0.07, agent: 0.005, popular: 0.4, rag: 0.09},
}
"""Sessions a second for 8 minis."""
BURST_EVERY, BURST = 150.0, 24
"""Seconds, and sessions: in `mix` half a burst are chats, half are questions to one application."""


def sessions_of(workload: str, seed: int, seconds: float = SECONDS) -> Iterator[Session]:
    """Yield the sessions of a workload, each kind at its rate, and in `mix` bursts of many at once."""
    rng = random.Random(seed)
    name = 0
    for kind, rate in WORKLOADS[workload].items():
        at = rng.expovariate(rate)
        while at < seconds:
            name += 1
            yield Session(at, kind(rng, name))
            at += rng.expovariate(rate)
    at = BURST_EVERY if workload == "mix" else seconds
    while at < seconds:
        for n in range(BURST):
            name += 1
            yield Session(at + rng.random(), (chat, popular)[n % 2](rng, name))
        at += BURST_EVERY


def _dialogue(
    rng: random.Random, name: int, start: _Prompt, turns: int, asked: float, said: float, pause: float
) -> tuple[Turn, ...]:
    made = []
    for n in range(turns):
        start.add((name, n, "asks"), _about(rng, asked))
        chain, prefixes, output = start.chain, start.prefixes(), _about(rng, said)
        start.add_answer((name, n, "answers"), output)
        made.append(Turn(chain, output, start.chain, rng.expovariate(1 / pause) if n else 0.0, prefixes))
        if start.chain[-1][1] > 120_000:
            break
    return tuple(made)


def _about(rng: random.Random, mean: float, sigma: float = 0.6) -> int:
    return max(4, int(rng.lognormvariate(0, sigma) * mean / 1.2))
