"""How far a request is, at any time: also before its answer is complete, and after it failed."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_worker.protocol.reply import Attempt


@dataclass(frozen=True, slots=True)
class Progress:
    """A request at one moment. A request that has ended keeps its last one."""

    attempt: int
    """The number of the present attempt, from 1."""
    node: str | None
    """The node that has accepted it, as in "local@mini-7"; None while it waits for one."""
    instance: str | None
    queue_wait: float | None
    """Seconds from the submission of the request until that node accepted it."""
    resumed: int
    """How many times the answer was continued by another node after a part of it had been delivered."""
    past: tuple[Attempt, ...]
    """The attempts that are over."""
