"""What a request in flight has to do, as its state machine (`attempts`) decides it."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_worker.protocol.reply import Deltas, LastFrame


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand these deltas to every reader."""

    frame: Deltas


@dataclass(frozen=True, slots=True)
class End:
    """Hand this last frame to every reader: the request has ended."""

    frame: LastFrame


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Send the next attempt after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class CancelOrphan:
    """Cancel this attempt and all earlier ones: they may still run on a node, and their answers are not wanted."""

    node: str | None
    """None if it is not known which node has it."""
    attempt: int


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Ask this node to send its latest frames again: one of them never arrived."""

    node: str


@dataclass(frozen=True, slots=True)
class TellTime:
    """Tell this node what the clock of the router shows: it took the request for expired, by another clock."""

    node: str


@dataclass(frozen=True, slots=True)
class Confirm:
    """Tell this node that it may begin: it has asked whether this attempt is still wanted."""

    node: str
    attempt: int


ToNode = CancelOrphan | AskAgain | TellTime | Confirm
"""What a node is told."""
Effect = Deliver | End | RetryAfter | ToNode
