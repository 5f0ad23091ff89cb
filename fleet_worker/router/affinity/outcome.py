"""How a prompt met the caches of the fleet."""

from __future__ import annotations

from fleet_worker.protocol.reply import CacheOutcome, Usage

USEFUL = 0.1
"""The share of a prompt from which it counts that a node holds it."""
FEW = 64
"""Tokens that are read so soon that it does not matter where they are cached."""


def outcome_of(usage: Usage, *, best: int, held: int, tokens: int) -> CacheOutcome | None:
    """Return what became of a prompt of about so many `tokens`; None if its server does not tell what was cached.

    The warmest node was believed to hold `best` of them, the node that answered `held`.
    """
    if usage.cached_tokens is None or not usage.prompt_tokens:
        return None
    if not tokens or best < USEFUL * tokens:
        return "cold"
    half = best / tokens / 2
    if usage.cached_tokens / usage.prompt_tokens >= half:
        return "hit"
    if best < FEW:
        return "cold"
    return "miss" if held / tokens >= half else "moved"
