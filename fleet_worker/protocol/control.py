"""What a router tells the nodes beside its requests: what is cancelled, and what it has missed."""

from __future__ import annotations

from pydantic import Field

from fleet_worker.protocol.wire import BrokerMessage


class ControlMessage(BrokerMessage):
    """What a router tells the nodes."""

    node: str | None = None
    """Who is meant; None for all."""
    cancelled: list[tuple[str, int]] = Field(default=[])
    """Requests, each with the last attempt that nobody waits for."""
    missed: str | None = None
    """A reply queue whose router was cut off for a moment: what went into it last should go there again."""
