"""What the requests of a client tell of its MLX server: which models it has loaded, and how long it may be silent.

A healthy server may deliver nothing for minutes: while it loads a model, and while it reads prompts.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Protocol

from fleet_worker.mlx.profiles import ServerProfile
from fleet_worker.mlx.timeouts import TimeoutThread
from fleet_worker.protocol.cache_digest import USUAL_PREFILL_SPEED
from fleet_worker.protocol.prompt_prefixes import USUAL_TOKENS_PER_BYTE

LOADS_WITHIN = 240.0
"""Seconds for loading a model, from a disk or another host."""
STAYS_LOADED = 60.0
"""Seconds for which a server that keeps several models has each at least, after its last use."""
PATIENCE = 4.0
"""Times that prompts may take longer than was measured: other requests run, and a long prompt is read more slowly."""
BLIND_PATIENCE = 8.0
"""The same, compared with the usual speed, until something was measured: 50 tokens per second."""
ENVELOPE = 200
"""Bytes of a request that are no prompt."""
STEP = 2048
"""Tokens of each prompt that a server reads before it tells how far it is."""
READ_TOGETHER = 8
"""Prompts that mlx_lm.server reads in one step."""


class ServerActivity:
    """Times are time.monotonic() seconds. Safe for all threads."""

    def __init__(self, timeouts: TimeoutThread, profile: ServerProfile) -> None:
        self._timeouts = timeouts
        self._profile = profile

    @property
    def last_progress(self) -> float:
        """When the server last told how much of a prompt it has read, or 0."""
        return self._timeouts.last_progress

    @property
    def may_be_blocked(self) -> bool:
        """Return whether a healthy server of this kind may be silent now, `/health` included."""
        return any(guard.awaits in self._profile.health_waits_for for guard in self._timeouts.awaited)

    @property
    def loaded(self) -> set[str]:
        """The models that the server has in its memory, as far as is known: what it calls them."""
        return self._loaded(time.monotonic())

    def forget(self) -> None:
        """The server was restarted, or another one has taken its place."""
        self._timeouts.delivered.clear()

    def may_be_silent(self, seconds: float, prefill_speed: float | None) -> bool:
        """Return whether a healthy server may deliver nothing for so long, with what it has been asked for.
        `prefill_speed` is tokens per second, None if it was not measured."""
        known, loaded = self._timeouts, self._loaded(time.monotonic() - seconds)
        tells_progress = known.last_progress > 0
        return seconds < longest_silence(
            known.awaited, loaded, prefill_speed=prefill_speed, tells_progress=tells_progress
        )

    def _loaded(self, since: float) -> set[str]:
        """Those at this time."""
        delivered = self._timeouts.delivered.copy()  # other threads add to it
        if self._profile.keeps_models:
            return {model for model, at in delivered.items() if at >= since - STAYS_LOADED}
        return {max(delivered, key=delivered.__getitem__)} if delivered else set()


class Awaited(Protocol):
    """A request that waits for its first content."""

    model: str | None
    size: int


def longest_silence(
    awaited: Iterable[Awaited], loaded: Collection[str], *, prefill_speed: float | None, tells_progress: bool
) -> float:
    """Return for how many seconds the server may be silent because of these requests; 0 if there are none.

    `loaded` are the models that are in its memory, `prefill_speed` is tokens per second if it was measured.
    `tells_progress`: after each step of a prompt it is not silent.
    """
    of_models = [each for each in awaited if each.model is not None]
    if not of_models:
        return 0.0
    tokens = USUAL_TOKENS_PER_BYTE * sum(max(0, each.size - ENVELOPE) for each in of_models)
    if tells_progress:
        tokens = min(tokens, STEP * min(len(of_models), READ_TOGETHER))
    reading = PATIENCE * tokens / prefill_speed if prefill_speed else BLIND_PATIENCE * tokens / USUAL_PREFILL_SPEED
    loading = 0.0 if {each.model for each in of_models} <= set(loaded) else LOADS_WITHIN
    return reading + loading
