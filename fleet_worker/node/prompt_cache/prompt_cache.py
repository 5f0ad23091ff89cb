"""What a node knows about the prompt cache of its MLX server: the prompts that it sent, and what answers tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fleet_worker.mlx.chat_stream import ChatAnswer
from fleet_worker.node.prompt_cache.conversations import Conversations
from fleet_worker.node.prompt_cache.prefills import Prefills
from fleet_worker.node.prompt_cache.shadow import Shadow
from fleet_worker.node.prompt_cache.speeds import Speeds
from fleet_worker.node.prompt_cache.troubles import LONG, Troubles
from fleet_worker.protocol.cache_digest import USUAL_PREFILL_SPEED, CacheDigest
from fleet_worker.protocol.prompt_prefixes import MOST_TOKENS_PER_BYTE, USUAL_TOKENS_PER_BYTE, PromptPrefixes
from fleet_worker.protocol.status import CacheTrouble

LONGEST_PREFILL = 86_400.0
"""Seconds that are told: what servers say of tokens is not always sensible."""


@dataclass(slots=True, eq=False)
class ServedPrompt:
    """One chat that the server works on. Lengths are bytes of its prompt, as in `PromptPrefixes`."""

    cache: PromptCache
    request_id: str
    model: str
    prefixes: PromptPrefixes
    believed: int
    """What the cache was believed to hold of it."""
    evicted: int
    """What it held once, of what it has evicted since."""
    continues: bool
    """It begins with all of a sequence that is held."""
    alone: bool
    """No other one ran since it began."""
    read_alone: bool = False
    """No other one ran before its first token."""

    def first_token(self) -> None:
        """Note that the server has read the prompt."""
        self.cache.read(self)

    def answered(self, answer: ChatAnswer) -> None:
        """Note how the answer ended. A request that failed, or was cancelled, teaches nothing more."""
        self.cache.answered(self, answer)


class PromptCache:
    """Safe for any number of threads. `sequences` is how many the server keeps, 0 if it has no cache.

    `forgets_on_swap`: the server loses its cache when it loads another model.
    """

    def __init__(
        self, sequences: int, *, forgets_on_swap: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lock = threading.Lock()
        self._shadow = Shadow(sequences)
        self._forgets_on_swap = forgets_on_swap
        self._running: set[ServedPrompt] = set()
        self._prefills = Prefills(clock)
        self._speeds = Speeds()
        self._tokens_per_byte: dict[str, float] = {}
        self._backend: str | None = None
        self._epoch = int(time.time())  # only ever compared with earlier ones of this node
        self._conversations = Conversations()
        self._troubles = Troubles(clock)

    @contextmanager
    def serving(
        self, request_id: str, model: str, prefixes: PromptPrefixes, *, backend: str = ""
    ) -> Iterator[ServedPrompt]:
        """Within this block the server works on this prompt. `backend` is what it calls the model."""
        with self._lock:
            self._note_model(backend)
            prompt = self._begin(request_id, model, prefixes)
        try:
            yield prompt
        finally:
            with self._lock:
                self._running.discard(prompt)
                self._prefills.ended(prompt)

    @property
    def prefill_speed(self) -> float | None:
        """Tokens per second; None until it was measured."""
        return self._speeds.prefill

    def clear(self) -> None:
        """The server was restarted, or another one has taken its place."""
        with self._lock:
            self._shadow.clear()
            self._troubles.forget_cache()
            self._epoch = max(self._epoch + 1, int(time.time()))

    def digest(self, node: str, *, slots: int, running: int) -> CacheDigest:
        """Return what routers are told; it is asked every second."""
        with self._lock:
            return CacheDigest(
                node=node,
                slots=slots,
                running=running,
                prefill_left=round(min(LONGEST_PREFILL, self._prefills.left), 3),
                prefill_speed=self._speeds.prefill,
                decode_speed=self._speeds.decode,
                epoch=self._epoch,
                held=self._shadow.held(),
                room=self._shadow.room,
            )

    def troubles(self) -> tuple[CacheTrouble, ...]:
        with self._lock:
            return self._troubles.found()

    # --- What a prompt tells ---

    def read(self, prompt: ServedPrompt) -> None:
        with self._lock:
            prompt.read_alone = prompt.alone
            self._prefills.ended(prompt)
            self._shadow.prefilled(prompt.prefixes)

    def answered(self, prompt: ServedPrompt, answer: ChatAnswer) -> None:
        tokens, cached = answer.usage.prompt_tokens, answer.usage.cached_tokens
        with self._lock:
            self._measure(prompt, answer)
            if tokens and prompt.prefixes.size:
                self._compare(prompt, tokens, cached)
            self._shadow.answered(prompt.prefixes)

    def _note_model(self, backend: str) -> None:
        """Clear the shadow if the server loads another model, and then forgets. The epoch stays: to warm the cache
        again would swap the model back."""
        if self._forgets_on_swap and self._backend not in (None, backend):
            self._shadow.clear()
        self._backend = backend

    def _begin(self, request_id: str, model: str, prefixes: PromptPrefixes) -> ServedPrompt:
        shadow = self._shadow
        prompt = ServedPrompt(
            self,
            request_id,
            model,
            prefixes,
            believed=shadow.match(prefixes),
            evicted=shadow.match_evicted(prefixes),
            continues=shadow.continues(prefixes),
            alone=not self._running,
        )
        self._troubles.began(model, request_id, changes=self._conversations.changes(prefixes))
        for other in self._running:
            other.alone = False
        self._running.add(prompt)
        speed = self._speeds.prefill or USUAL_PREFILL_SPEED
        self._prefills.began(prompt, self._tokens(prompt, prefixes.size - prompt.believed) / speed)
        return prompt

    def _tokens(self, prompt: ServedPrompt, size: int) -> float:
        return size * self._tokens_per_byte.get(prompt.model, USUAL_TOKENS_PER_BYTE)

    def _measure(self, prompt: ServedPrompt, answer: ChatAnswer) -> None:
        tokens, cached = answer.usage.prompt_tokens or 0, answer.usage.cached_tokens
        if cached is None:  # nobody knows what was cached, unless nothing was
            is_new = prompt.prefixes.chain and not prompt.believed
            cached = 0 if is_new else tokens
        self._speeds.learn(answer, tokens - cached, read_alone=prompt.read_alone, alone=prompt.alone)

    def _compare(self, prompt: ServedPrompt, tokens: int, cached: int | None) -> None:
        """Correct the shadow by what the server had in its cache, if it tells; and find out what is wrong with that."""
        size = prompt.prefixes.size
        per_byte = tokens / size
        self._tokens_per_byte[prompt.model] = min(MOST_TOKENS_PER_BYTE, per_byte)
        held = prompt.believed if cached is None else min(size, int(cached / per_byte))
        is_missed = 2 * held < prompt.believed
        if is_missed:
            self._shadow.forget(prompt.prefixes, held)
        about = prompt.model, prompt.request_id
        if cached is not None and prompt.believed * per_byte >= LONG:
            self._troubles.repeated(*about, cached=cached)
        too_late = (prompt.evicted - held) * per_byte >= LONG or (is_missed and prompt.continues)
        self._troubles.answered(*about, came_too_late=too_late)
