"""How a prompt met the caches of the fleet."""

from __future__ import annotations

from fleet_worker.protocol.reply import CacheOutcome, Usage

USEFUL = 0.1
"""The share of a prompt from which it counts that a node holds it."""


def outcome_of(usage: Usage, *, best: int, held: int, tokens: int) -> CacheOutcome | None:
    """Return what became of a prompt, of which there are about so many `tokens`: the warmest node was believed to hold
    `best` of them, the node that answered `held`. None if its server does not tell what was cached.

    - cold: no node was believed to hold a useful part.
    - hit: the server had at least half of what the warmest node was believed to hold.
    - miss: it had less, though it was believed to have it.
    - moved: the warmest node was another one, which was too busy, gone or failed.
    """
    if usage.cached_tokens is None or not usage.prompt_tokens:
        return None
    if not tokens or best < USEFUL * tokens:
        return "cold"
    half = best / tokens / 2
    if usage.cached_tokens / usage.prompt_tokens >= half:
        return "hit"
    return "miss" if held / tokens >= half else "moved"
