"""How many servers, or their nodes, died while they had one request. After `MAX_DEATHS` it is not tried again.

A node that falls silent counts as dead, unless its whole host is silent: then it may have died with its host; or the
host sleeps, swaps, or has lost its network. What the host says when it is heard again decides. Pure: no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fleet_worker.protocol.status import InstanceStatus

MAX_DEATHS = 2
"""If so many died while they had a request, the request is taken for the cause."""
WAITS_FOR = 60.0
"""Seconds that a request waits for the word of silent hosts, if it may be the cause: a host restarts in that time."""
WAITS_AT_MOST = 0.25
"""The part of the time until its deadline that it waits at most."""
HEARTBEAT = 1.5
"""Seconds after the last heartbeat of a node in which its host may still have been heard: there is one every second."""
SETTLED_AFTER = 5.0
"""Seconds after which a host that is heard again knows of all its nodes, and these of their servers."""
LIVES = frozenset({"available", "degraded", "drained", "away"})
"""The states of an instance whose server has not died."""

Look = Callable[[str], InstanceStatus | None]
"""Returns what a host has said last about a node; None if nothing, or if that was too long ago."""
Verdict = Literal["open", "died", "lived"]


@dataclass(slots=True)
class Silence:
    """A node that fell silent together with its host. Times are those of `InstanceStatus.heard_at`."""

    node: str
    before: InstanceStatus
    since: float
    """When the node was heard last."""
    heard_again: float | None = None

    @classmethod
    def of(
        cls, node: str, since: float, *, accepted: InstanceStatus | None, seen: InstanceStatus | None
    ) -> Silence | None:
        """Return None if it is not the whole host that is silent, or nothing is known of it. `accepted` is what was
        `seen` of the node when it accepted the request."""
        before = accepted if accepted and accepted.pid is not None else seen
        if before is None:
            return None
        silence = cls(node, before, since)
        is_host = seen is None or (silence._lives(seen) and not silence._is_heard(seen))
        return silence if is_host else None

    def verdict(self, seen: InstanceStatus | None, now: float) -> Verdict:
        """Decide whether the node, or its server, has died meanwhile."""
        if seen is None or not self._is_heard(seen):
            return "open"
        self.heard_again = now if self.heard_again is None else self.heard_again
        if self._is_another(seen):
            return "died"
        if self._lives(seen):
            return "lived"
        return "died" if now - self.heard_again >= SETTLED_AFTER else "open"

    def _is_heard(self, seen: InstanceStatus) -> bool:
        return seen.heard_at > self.since + HEARTBEAT

    def _is_another(self, seen: InstanceStatus) -> bool:
        """Return whether another process is the node, or its server, than before."""
        is_restarted = (seen.server_restarts or 0) > (self.before.server_restarts or 0)
        is_other_process = (seen.pid, seen.process) != (self.before.pid, self.before.process)
        return seen.pid is not None and (is_other_process or is_restarted)

    def _lives(self, seen: InstanceStatus) -> bool:
        return seen.pid is not None and not self._is_another(seen) and seen.status in LIVES


class Deaths:
    """Those that one request may have caused."""

    def __init__(self) -> None:
        self.certain = 0
        self._silences: list[Silence] = []
        self._waits_until = 0.0

    def __bool__(self) -> bool:
        """True if there may have been one."""
        return self.certain > 0 or bool(self._silences)

    @property
    def are_enough(self) -> bool:
        return self.certain >= MAX_DEATHS

    @property
    def are_open(self) -> bool:
        """True if a host is silent whose word decides."""
        return bool(self._silences)

    def fell_silent(self, silence: Silence, now: float, deadline: float) -> None:
        """Note a node that may have died. If that would be enough, the next attempt has to wait for its host."""
        self._silences.append(silence)
        self._waits_until = now + min(WAITS_FOR, (deadline - now) * WAITS_AT_MOST)

    def must_wait(self, now: float) -> bool:
        """Return whether the next attempt must not begin yet: it may kill one more server."""
        return self.are_open and self.certain + len(self._silences) >= MAX_DEATHS and now < self._waits_until

    def look_at_silent(self, look: Look, now: float) -> None:
        """Decide about the nodes whose hosts are heard again."""
        verdicts = [(each, each.verdict(look(each.node), now)) for each in self._silences]
        self.certain += sum(verdict == "died" for _, verdict in verdicts)
        self._silences = [each for each, verdict in verdicts if verdict == "open"]
