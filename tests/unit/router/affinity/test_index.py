"""Which nodes hold which beginnings of prompts: against a model that is too simple to be wrong."""

from __future__ import annotations

import tracemalloc

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.router.affinity import index as index_module
from fleet_worker.router.affinity.index import KEPT_FOR, MOST_OWN, ON_THE_WAY, CacheIndex

NODES = ["a", "b", "c"]
IDS = [letter * 11 for letter in "ABCDEFGH"]
SESSION = "S" * 11

chains = st.lists(st.sampled_from(IDS), min_size=1, max_size=4, unique=True).map(
    lambda ids: tuple((id_, 100 * (n + 1)) for n, id_ in enumerate(ids))
)
prompts = st.builds(PromptPrefixes, st.none() | st.just(SESSION), st.none(), chains)
nodes = st.sampled_from(NODES)
steps = st.sampled_from([0.0, 0.1, ON_THE_WAY + 0.1, KEPT_FOR / 2])


def _ids(prefixes: PromptPrefixes) -> list[str]:
    return [id_ for id_, _ in prefixes.chain] + ([SESSION] if prefixes.session else [])


class _Index(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = CacheIndex()
        self.now = 0.0
        self.told: dict[str, set[str]] = {}
        self.sent: dict[tuple[str, str], float] = {}

    @rule(node=nodes, held=st.lists(st.sampled_from([*IDS, SESSION]), max_size=6), step=steps)
    def a_digest_comes(self, node: str, held: list[str], step: float) -> None:
        self.now += step
        self.index.tell(node, held, self.now)
        self.told[node] = set(held)
        for key in [key for key, at in self.sent.items() if key[0] == node and at <= self.now - ON_THE_WAY]:
            del self.sent[key]

    @rule(node=nodes, prompt=prompts, step=steps)
    def a_request_is_sent(self, node: str, prompt: PromptPrefixes, step: float) -> None:
        self.now += step
        self.index.send(node, prompt, self.now)
        self.sent |= {(node, id_): self.now for id_ in _ids(prompt)}

    @rule(node=nodes)
    def a_cache_is_emptied(self, node: str) -> None:
        self.index.empty(node)
        self._forget(node)

    @rule(known=st.sets(nodes))
    def it_is_swept(self, known: set[str]) -> None:
        self.index.sweep(known, self.now)
        for node in set(NODES) - known:
            self._forget(node)
        self.sent = {key: at for key, at in self.sent.items() if at >= self.now - KEPT_FOR}

    @invariant()
    def it_matches_what_is_held(self) -> None:
        for session, chain in ((None, IDS), (SESSION, IDS[::-1]), (SESSION, IDS[2:5])):
            prompt = PromptPrefixes(session, None, tuple((id_, 100 * (n + 1)) for n, id_ in enumerate(chain)))
            expected = {node: size for node in NODES if (size := self._held_by(node, prompt))}
            assert self.index.match(prompt) == expected
            assert {node: self.index.held_by(node, prompt) for node in expected} == expected

    @invariant()
    def nothing_is_left_of_what_is_gone(self) -> None:
        held = set().union(*map(self._all_of, NODES))
        assert self.index._holders.keys() == held

    def _held_by(self, node: str, prompt: PromptPrefixes) -> int:
        held = self._all_of(node)
        size = max((length for id_, length in prompt.chain if id_ in held), default=0)
        return max(size, prompt.size // 4) if prompt.session in held else size

    def _all_of(self, node: str) -> set[str]:
        return self.told.get(node, set()) | {id_ for at, id_ in self.sent if at == node}

    def _forget(self, node: str) -> None:
        self.told.pop(node, None)
        self.sent = {key: at for key, at in self.sent.items() if key[0] != node}


TestIndex = _Index.TestCase
TestIndex.settings = settings(stateful_step_count=20)


def test_what_is_sent_to_a_node_that_tells_nothing_is_bounded() -> None:
    index = CacheIndex()
    for n in range(3 * MOST_OWN):
        index.send("old", PromptPrefixes(chain=((f"{n:011}", 100),)), float(n))
    assert len(index._holders) == MOST_OWN
    assert index.match(PromptPrefixes(chain=((f"{3 * MOST_OWN - 1:011}", 100),))) == {"old": 100}


def test_a_hundred_nodes_with_sixty_prefixes_take_less_than_800_kb() -> None:
    """None of them held by two nodes, and each told twice."""
    index = CacheIndex()
    tracemalloc.start()
    for now in (1.0, 2.0):
        for node in range(100):
            index.tell(f"local@mini-{node:04}", [f"{node:05}{n:06}" for n in range(60)], now)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 0.8e6


def test_what_all_nodes_tell_together_is_bounded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Forged digests leave no memory for more; what is forgotten makes room again."""
    monkeypatch.setattr(index_module, "MOST_TOLD", 100)
    index = CacheIndex()
    index.tell("known", [f"a{number}" for number in range(60)], now=0.0)
    index.tell("forged", [f"b{number}" for number in range(60)], now=0.0)
    assert len(index._told["forged"]) == 40
    index.tell("known", [f"a{number}" for number in range(1, 61)], now=1.0)
    assert len(index._told["known"]) == 60
    index.empty("forged")
    index.tell("other", [f"c{number}" for number in range(60)], now=1.0)
    assert (len(index._told["known"]), len(index._told["other"])) == (60, 40)
