"""Which nodes are believed to have which beginnings of prompts in their caches."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from fleet_worker.protocol.prompt_prefixes import PromptPrefixes

MOST_OWN = 256
"""Ids that are remembered of what this router sent to one node, until that node itself tells what it holds."""
MOST_TOLD = 300_000
"""Ids in the last digests of all nodes together, about 50 MB: anybody who may use the broker may send digests."""
KEPT_FOR = 900.0
"""Seconds for which a node that tells nothing is believed to hold what it was sent."""
ON_THE_WAY = 0.5
"""Seconds that a digest may have been on its way: what was sent less than that before it came counts beside it."""
SESSION_SHARE = 4
"""A node that has seen a session key is believed to hold one part in so many of the prompt, if not more."""


class CacheIndex:
    """The ids by node, and the nodes by id. Not thread-safe. Times are those of one monotonic clock.

    A node holds what its last digest names, and what this router sent there since.
    """

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, ...]] = {}
        self._told_in_all = 0
        self._sent: dict[str, dict[str, float]] = {}
        """By node: when each id was sent there last, the oldest first."""
        self._holders: dict[str, str | set[str]] = {}
        """By id: one node, or a set of several. Most ids have one, and a set takes 200 bytes."""

    def match(self, prefixes: PromptPrefixes) -> dict[str, int]:
        """Return for each node that holds a part of this prompt how many bytes of it."""
        found: dict[str, int] = {}
        for id_, length in reversed(prefixes.chain):
            found |= dict.fromkeys(self._nodes_with(id_).difference(found), length)
        if prefixes.session:
            for node in self._nodes_with(prefixes.session):
                found[node] = max(found.get(node, 0), prefixes.size // SESSION_SHARE)
        return found

    def held_by(self, node: str, prefixes: PromptPrefixes) -> int:
        """Return how many bytes of this prompt a node holds."""
        held = next((length for id_, length in reversed(prefixes.chain) if node in self._nodes_with(id_)), 0)
        if prefixes.session and node in self._nodes_with(prefixes.session):
            return max(held, prefixes.size // SESSION_SHARE)
        return held

    def most_held(self, prefixes: PromptPrefixes, nodes: Collection[str]) -> int:
        """Return how many bytes of this prompt the warmest of these nodes holds, whatever its session says."""
        chain = reversed(prefixes.chain)
        return next((length for id_, length in chain if not self._nodes_with(id_).isdisjoint(nodes)), 0)

    def tell(self, node: str, held: Iterable[str], now: float) -> None:
        """Learn all that a node holds, from a digest that came `now`; less of it if this index is full."""
        before = {id_: id_ for id_ in self._ids_of(node)}
        room = max(0, MOST_TOLD - self._told_in_all + len(self._told.get(node, ())))
        # One text for each id: those of every new digest would take as much memory again.
        self._keep(node, tuple(before.get(id_, id_) for id_ in itertools.islice(held, room)))
        sent = self._sent.pop(node, {})
        if newer := {id_: at for id_, at in sent.items() if at > now - ON_THE_WAY}:
            self._sent[node] = newer
        after = set(self._ids_of(node))
        self._remove(node, before.keys() - after)
        self._add(node, after - before.keys())

    def send(self, node: str, prefixes: PromptPrefixes, now: float) -> None:
        """Note that a node is working on this prompt, or has answered it."""
        sent = self._sent.setdefault(node, {})
        ids = [id_ for id_, _ in prefixes.chain] + ([prefixes.session] if prefixes.session else [])
        for id_ in ids:
            sent.pop(id_, None)
            sent[id_] = now
        self._add(node, ids)
        self._forget_sent(node, list(sent)[:-MOST_OWN])

    def empty(self, node: str) -> None:
        """Note that a node holds nothing: it is gone, or its cache was emptied."""
        self._remove(node, self._ids_of(node))
        self._told_in_all -= len(self._told.pop(node, ()))
        self._sent.pop(node, None)

    def sweep(self, known: Collection[str], now: float) -> None:
        """Forget all nodes that are not `known`, and what was sent too long ago."""
        for node in [node for node in self._told.keys() | self._sent.keys() if node not in known]:
            self.empty(node)
        for node, sent in list(self._sent.items()):
            self._forget_sent(node, [id_ for id_, at in sent.items() if at < now - KEPT_FOR])

    def _nodes_with(self, id_: str) -> set[str]:
        holders = self._holders.get(id_)
        if holders is None:
            return _NONE
        return {holders} if isinstance(holders, str) else holders

    def _keep(self, node: str, told: tuple[str, ...]) -> None:
        self._told_in_all += len(told) - len(self._told.get(node, ()))
        self._told[node] = told

    def _ids_of(self, node: str) -> list[str]:
        return [*self._told.get(node, ()), *self._sent.get(node, ())]

    def _forget_sent(self, node: str, ids: Collection[str]) -> None:
        sent, told = self._sent.get(node), self._told.get(node, ())
        if not sent or not ids:
            return
        for id_ in ids:
            sent.pop(id_, None)
        if not sent:
            del self._sent[node]
        self._remove(node, set(ids).difference(told))

    def _add(self, node: str, ids: Iterable[str]) -> None:
        for id_ in ids:
            holders = self._holders.setdefault(id_, node)
            if isinstance(holders, set):
                holders.add(node)
            elif holders != node:
                self._holders[id_] = {holders, node}

    def _remove(self, node: str, ids: Iterable[str]) -> None:
        for id_ in ids:
            holders = self._holders.get(id_)
            if isinstance(holders, set):
                holders.discard(node)
                if len(holders) == 1:
                    self._holders[id_] = holders.pop()
            elif holders == node:
                del self._holders[id_]


_NONE: set[str] = set()
