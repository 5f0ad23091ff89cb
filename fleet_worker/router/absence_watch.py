"""For how long no node that could take a request has been ready, while it waits for one."""

from __future__ import annotations

import math
import time

from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.node_selection import NodeSelection
from fleet_worker.router.reply_consumer import ReplyConsumer

LOOK_AGAIN_AFTER = 0.25
"""Seconds between two looks at least: the clock of the reply consumer goes in steps."""


class AbsenceWatch:
    """Of one request, and of each time that it waits: at first, and after an interruption.

    Only time with a broker counts, since without one nothing is heard of nodes. After each break it counts from 0.
    """

    def __init__(self, limit: float, nodes: NodeSelection, replies: ReplyConsumer) -> None:
        """`limit`: seconds that the request may wait while no node is there."""
        self.limit = limit
        self._nodes = nodes
        self._replies = replies
        self._since: float | None = None
        """Since when no node is there, on the clock of the reply consumer; None if one was at the last look."""

    def accepted(self) -> None:
        """A node has taken the request."""
        self._since = None

    def look(self, request: FleetRequest, only: str | None, *, is_served: bool = False) -> bool:
        """Look whether a node is there for the request; return True if none was for `limit` seconds. `only` is the only
        node that may take it; `is_served` tells whether a node works on other requests of its lane."""
        if math.isinf(self.limit) or self._nodes.may_be_there(request, only, is_served=is_served):
            self._since = None
            return False
        if self._since is None:
            self._since = self._replies.clock
        return self._left() <= 0

    def next_look(self) -> float:
        """Return when `look` may be True, in time.monotonic() seconds; math.inf if a node was there."""
        return math.inf if self._since is None else time.monotonic() + max(self._left(), LOOK_AGAIN_AFTER)

    def _left(self) -> float:
        return self.limit - self._replies.silence(self._since or 0.0)
