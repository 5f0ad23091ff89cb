"""Decides which prompts are run again on a server that lost its cache, so that their conversations find it warm.

A node tells so by the epoch in its digest. From then on the prompts that it answered last are due, the one with the
most to gain first, one after the other. What it says between two of them counts: another router may be doing the same.
"""

from __future__ import annotations

import heapq
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from fleet_worker.protocol.cache_digest import USUAL_PREFILL_SPEED, CacheDigest
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.request import Operation
from fleet_worker.router.affinity.kept_prompts import KEPT_FOR, LEAST_SIZE, KeptPrompt, KeptPrompts

log = logging.getLogger(__name__)

MOST_PROMPTS: Final = 8
"""For one node each time. mlx_lm.server holds 10 unless told otherwise, and what callers send needs room, too."""
SPARE_ROOM: Final = 2
"""Prompts for which the cache keeps room."""
MOST_SECONDS: Final = 60.0
"""Expected seconds of prefill on one node after which no further prompt is begun."""
HALF_LIFE: Final = 120.0
"""Seconds after which a conversation is half as likely to go on soon."""
RESTS_FOR: Final = KEPT_FOR
"""Seconds for which a node is left alone after one of these requests failed there: it may have killed the server."""
DIGEST_WITHIN: Final = 3.0
"""Seconds that the next prompt waits for what the node tells after the last one."""
MOST_CONSIDERED: Final = 100
"""Prompts of one node: the latest ones."""
MOST_NODES: Final = 10_000

Outcome = Literal["answered", "failed", "not_taken"]
ReadyNodes = Callable[[str, Operation], Collection[str]]


@dataclass(slots=True, eq=False)
class WarmUp:
    """One prompt that is due on a node."""

    prompt: KeptPrompt
    node: str
    epoch: int
    seconds: float
    """Of prefill, expected."""
    is_accepted: bool = False
    """The node has begun it."""


@dataclass(slots=True)
class _Round:
    """What is done for one node since its server lost its cache."""

    epoch: int
    digest: CacheDigest
    not_before: float = 0.0
    """When the next prompt may begin, if the node tells nothing until then."""
    begun: int = 0
    seconds: float = 0.0
    under_way: WarmUp | None = None
    model: str | None = None
    """That of the latest prompt. Those of other models are left out: a server may have to swap its model for them."""
    is_over: bool = False


class Warming:
    """Thread-safe; it sends nothing itself.

    `holders` returns how many bytes of a prompt each node has cached; `ready_nodes`, which nodes can do an operation
    with a model now.
    """

    def __init__(
        self,
        kept: KeptPrompts,
        holders: Callable[[PromptPrefixes], Mapping[str, int]],
        ready_nodes: ReadyNodes,
    ) -> None:
        self._kept = kept
        self._holders = holders
        self._ready_nodes = ready_nodes
        self._lock = threading.Lock()
        self._epochs: OrderedDict[str, int] = OrderedDict()
        """By node, the one that was heard last at the end."""
        self._rounds: dict[str, _Round] = {}
        self._rests_until: dict[str, float] = {}

    def epoch_of(self, node: str) -> int | None:
        """Return the epoch that a node told last; None if it has told none."""
        return self._epochs.get(node)

    def heard(self, digest: CacheDigest, now: float) -> bool:
        """Learn what a node tells. Return whether something may be due for it."""
        node, epoch = digest.node, digest.epoch
        with self._lock:
            before = self._epochs.get(node)
            self._epochs[node] = epoch
            self._epochs.move_to_end(node)
            if len(self._epochs) > MOST_NODES:
                self._epochs.popitem(last=False)
            current = self._rounds.get(node)
            if current is None and before in (None, epoch):
                return False
            if current is None or current.epoch != epoch:
                current = self._begin(digest, current, now)
            current.digest, current.not_before = digest, 0.0
            return not current.is_over

    def due(self, now: float, only: str | None = None) -> Iterator[WarmUp]:
        """Yield what is to be sent now, to all nodes or to one. Each of these must be `ended` at some time."""
        for node in list(self._rounds) if only is None else [only]:
            with self._lock:
                current = self._rounds.get(node)
                next_one = self._next(node, current, now) if current else None
            if next_one:
                yield next_one

    def ended(self, warm_up: WarmUp, outcome: Outcome, now: float) -> None:
        """Learn what became of one: the node has answered it, it failed, or no slot was free for it."""
        with self._lock:
            current = self._rounds.get(warm_up.node)
            if current is None or current.under_way is not warm_up:
                return
            current.under_way = None
            if warm_up.epoch != current.epoch:  # the server lost its cache once more
                return
            current.not_before = now + DIGEST_WITHIN
            current.digest = current.digest.model_copy(update={"running": 0})  # what it told counted this one
            if outcome == "answered":
                warm_up.prompt.epoch = warm_up.epoch
            else:
                current.is_over = True
            if outcome == "failed":
                self._give_up(warm_up, now)

    def forget_old(self, now: float) -> None:
        """Forget what is too old to matter."""
        self._kept.forget_old(now)
        with self._lock:
            self._rests_until = {node: until for node, until in self._rests_until.items() if until > now}
            rounds = self._rounds.items()
            self._rounds = {node: each for node, each in rounds if not each.is_over and self._kept.has_any_of(node)}

    def _begin(self, digest: CacheDigest, last: _Round | None, now: float) -> _Round:
        waiting = last.under_way if last else None
        if waiting and waiting.is_accepted:
            self._give_up(waiting, now)
            waiting = None
        # What still waits there is waited for: whoever tells other epochs again and again gets no more of them.
        is_over = now < self._rests_until.get(digest.node, now)
        begun = _Round(digest.epoch, digest, under_way=waiting, is_over=is_over)
        self._rounds[digest.node] = begun
        return begun

    def _give_up(self, warm_up: WarmUp, now: float) -> None:
        """The server may have died of that prompt: it is tried nowhere again, and this node is left alone."""
        self._kept.forget(warm_up.prompt)
        self._rests_until[warm_up.node] = now + RESTS_FOR

    def _next(self, node: str, current: _Round, now: float) -> WarmUp | None:
        if current.is_over or current.under_way or now < current.not_before or not _has_time(current.digest):
            return None
        ready = cache(self._ready_nodes)
        due = self._most_to_gain(node, current, ready, now)
        if not due or current.begun >= MOST_PROMPTS or current.seconds >= MOST_SECONDS or not _has_room(current.digest):
            current.is_over = True
            return None
        prompt, gain = due[0]
        if node not in ready(prompt.request.model, prompt.request.operation):
            return None
        if not current.begun:
            most = min(len(due), MOST_PROMPTS)
            log.info("%s has lost its prompt cache: it reads recent prompts again, %d at most", node, most)
        seconds = prompt.tokens * gain / prompt.prefixes.size / (current.digest.prefill_speed or USUAL_PREFILL_SPEED)
        current.begun += 1
        current.seconds += seconds
        current.under_way = WarmUp(prompt, node, current.epoch, seconds)
        return current.under_way

    def _most_to_gain(self, node: str, current: _Round, ready: ReadyNodes, now: float) -> list[tuple[KeptPrompt, int]]:
        """Return the prompts that the server had before, each with the bytes that no ready node has of it; the one with
        the most of them first. A prompt counts less the older it is."""
        lost = [each for each in self._kept.answered_by(node) if each.epoch not in (None, current.epoch)]
        latest = heapq.nlargest(MOST_CONSIDERED, lost, key=lambda prompt: prompt.answered_at)
        if latest and current.model is None:
            current.model = latest[0].request.model
        usable = [each for each in latest if each.request.model == current.model and each.answered_at > now - KEPT_FOR]
        gains = [(prompt, self._gain(node, prompt, ready)) for prompt in usable]
        worth = [(prompt, gain) for prompt, gain in gains if gain >= LEAST_SIZE]
        return sorted(worth, key=lambda one: -one[1] * 0.5 ** ((now - one[0].answered_at) / HALF_LIFE))

    def _gain(self, node: str, prompt: KeptPrompt, ready: ReadyNodes) -> int:
        able = {node, *ready(prompt.request.model, prompt.request.operation)}
        held = (size for holder, size in self._holders(prompt.prefixes).items() if holder in able)
        return prompt.prefixes.size - max(held, default=0)


def _has_time(digest: CacheDigest) -> bool:
    """Leave a slot to callers."""
    return digest.running == 0 or digest.running + 1 < digest.slots


def _has_room(digest: CacheDigest) -> bool:
    return digest.room is None or digest.room > SPARE_ROOM
