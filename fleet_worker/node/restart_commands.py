"""The control commands that restart a node's process, or its MLX server.

Anybody who reaches the broker can send them. So each is obeyed only if it names the node, and at most once in
`RESTARTS_APART`; the start of a process counts as its first restart. A server may take minutes to load, and would never
serve if it was restarted all the time: its pauses double.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from fleet_worker.broker.control_commands import Command
from fleet_worker.host.parent_pipe import is_supervised
from fleet_worker.node.node import Node

log = logging.getLogger(__name__)

RESTARTS_APART = 10.0
"""Seconds."""
LONGEST_APART = 3600.0
"""Seconds between two restarts of a server, when they never end. Without one for twice as long, the pauses begin
anew."""
ANSWERS_FIRST = 0.2
"""Seconds until a node that has nothing to do ends: its answer has left by then."""
NOBODY_STARTS_IT = "nothing would start it again: it was not started by fleet-worker up"


def restart_commands(node: Node, restart: Callable[[], None]) -> dict[str, Command]:
    """Return the control commands by name. `restart` ends the process in such a way that `up` starts it again.

    Each replies with an `error` (empty if it is obeyed), the seconds after which one that comes too soon can come again
    (`again_in`), the `process` and `server_restarts` before it, and the seconds of `grace` that running requests have.
    """

    def restart_node() -> str:
        if not is_supervised():
            return NOBODY_STARTS_IT
        threading.Timer(ANSWERS_FIRST, restart).start()
        return ""

    return {
        "restart": _Limited(node, "this node", restart_node, last=time.monotonic()),
        "restart_server": _Limited(node, "its MLX server", node.restart_server, growing=2.0),
    }


class _Limited:
    """A restart that is not obeyed again too soon."""

    def __init__(
        self, node: Node, what: str, act: Callable[[], str], *, last: float = -math.inf, growing: float = 1.0
    ) -> None:
        self._node = node
        self._what = what
        self._act = act
        self._last = last
        self._growing = growing
        self._apart = RESTARTS_APART

    def __call__(self, state: Any) -> dict[str, Any]:
        before = {"process": self._node.process, "server_restarts": self._node.server_restarts}
        now = time.monotonic()
        again_in = max(0.0, self._last + self._apart - now)
        error = f"it was restarted just now: try again in {again_in:.0f} s" if again_in else self._act()
        if not error:
            again = now - self._last < 2 * LONGEST_APART
            self._apart = min(LONGEST_APART, self._apart * self._growing) if again else RESTARTS_APART
            self._last = now
            log.warning("%s: an operator restarts %s", self._node.name, self._what)
        grace = self._node.settings.worker.drain_grace
        return {**before, "error": error, "again_in": again_in, "grace": grace}
