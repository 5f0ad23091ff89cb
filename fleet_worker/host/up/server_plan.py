"""When a managed server is stopped and started on purpose, and what its node is told meanwhile: a pure state machine.

    a wish: Resume -> Pause(restarting) -> the node is idle -> restart -> the server accepts connections -> Resume
    away:   Resume -> Pause(away) -> the node is idle -> stop ... back: start -> it accepts connections -> Resume

It looks at what is so now, not at what has happened, so that everything may overlap: the owner comes during a restart,
the configuration is read again while he is there, and all of it ends at any moment. A server that dies is none of its
business: `ManagedServer` starts that again at once, as there is nothing to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fleet_worker.host.node_process import NEVER
from fleet_worker.protocol.host_messages import Order, Pause, Resume

LATE = 5.0
"""Seconds beyond the grace of a pause after which nobody waits for its node any more: it is frozen."""
STARTS = "its MLX server starts"

Cause = Literal["memory", "fault", "operator", "configuration"]
_BY_WEIGHT: tuple[Cause, ...] = ("memory", "fault", "operator", "configuration")


@dataclass(frozen=True, slots=True)
class Wish:
    """A restart of the server."""

    cause: Cause
    reason: str
    grace: float
    """Seconds that running requests have to end. Then other nodes continue them."""

    def combined_with(self, other: Wish) -> Wish:
        """Return one wish for two: that of more weight, as urgent as the other."""
        heavier = max(self, other, key=lambda wish: _BY_WEIGHT.index(wish.cause))  # the first of two equal ones
        return Wish(heavier.cause, heavier.reason, min(self.grace, other.grace))

    @property
    def ends_with_server(self) -> bool:
        """If the server ends by itself, it is fulfilled."""
        return self.cause in ("memory", "fault")


@dataclass(frozen=True, slots=True)
class Away:
    """The owner comes first."""

    reason: str
    grace: float
    """Seconds that running requests have to end."""
    stops_server: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """What counts for the plan."""

    now: float
    node_runs: bool
    """A process of it does."""
    completed_pause: int
    """Its number, as the node has told; 0 if none is complete."""
    serves: bool
    """The server accepts connections."""


class ServerPlan:
    """The plan for one instance. Call `step` whenever something may have changed, and at the time `due`."""

    def __init__(self) -> None:
        self.wanted = True
        """False as soon as the instance leaves: its server ends after its node."""
        self.away: Away | None = None
        self.order: Order = Resume(0)
        """What its node has to be told, also when it connects anew."""
        self.off = True
        """The server is stopped on purpose, or has not been started yet."""
        self.due = NEVER
        self._wish: Wish | None = None
        self._held = ""
        """Why the node has to wait: its server was stopped or restarted on purpose, and does not serve yet."""
        self._deadline = NEVER
        """When the node has had its time, since the pause began."""

    def wish(self, wish: Wish) -> None:
        self._wish = self._wish.combined_with(wish) if self._wish else wish

    def step(self, seen: Seen) -> Literal["", "start", "stop"] | Wish:
        """Return what has to be done with the server now, if anything, and call `step` again after it. The server must
        not `serve` any more then, until it has been started.
        """
        if seen.serves:
            self._held = ""
        elif self._wish and self._wish.ends_with_server:
            self._wish = None
        if not self.wanted:
            self._wish = None
        self._give_order(seen.now)
        is_over = seen.completed_pause == self.order.order or seen.now >= self._deadline
        is_quiet = not seen.node_runs or (isinstance(self.order, Pause) and is_over)
        return self._act(quiet=is_quiet, seen=seen)

    def _give_order(self, now: float) -> None:
        pause = self._pause()
        number = self.order.order + 1
        if not pause:
            if isinstance(self.order, Pause):
                self.order, self._deadline = Resume(number), NEVER
            return
        status, reason, grace = pause
        deadline = now + grace + LATE
        told = isinstance(self.order, Pause) and (self.order.status, self.order.reason) == (status, reason)
        if not told or (deadline < self._deadline and (self.away or self._wish)):
            self.order = Pause(status, reason, grace, number)
            self._deadline = min(self._deadline, deadline)

    def _pause(self) -> tuple[Literal["away", "restarting"], str, float] | None:
        if self.away:
            return "away", self.away.reason, self.away.grace
        if self._wish:
            return "restarting", self._wish.reason, self._wish.grace
        return ("restarting", self._held, 0.0) if self._held else None

    def _act(self, *, quiet: bool, seen: Seen) -> Literal["", "start", "stop"] | Wish:
        self.due = NEVER
        must_be_off = not self.wanted or (self.away is not None and self.away.stops_server)
        wish, self._wish = self._wish, None
        if self.off or must_be_off:
            wish = None  # the next server is a new one anyway
        if wish and (quiet or not seen.serves):
            self._held = wish.reason
            return wish
        if must_be_off and not self.off and quiet:
            self.off, self._held = True, STARTS
            return "stop"
        if self.off and not must_be_off:
            self.off = False
            return "start"
        self._wish = wish
        if wish or must_be_off != self.off:
            self.due = NEVER if quiet else self._deadline
        return ""
