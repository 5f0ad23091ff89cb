"""What a router sends to nodes besides requests."""

from __future__ import annotations

from pydantic import Field

from fleet_worker.protocol.wire import BrokerMessage


class ControlMessage(BrokerMessage):
    """Cancels requests, or asks for replies to be sent again."""

    node: str | None = None
    """The node that it is for; None for all nodes."""
    cancelled: list[tuple[str, int]] = Field(default=[])
    """Ids of cancelled requests, each with the number of the last attempt that is cancelled."""
    missed: str | None = None
    """A reply queue whose router was disconnected for a moment: what was sent to it last must be sent again."""
