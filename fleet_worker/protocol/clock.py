"""The clock of this process: seconds since the epoch that never jump.

It begins with the time of the host and then counts as time.monotonic() does. So it is as wrong as the host's clock was
when the process started, but no correction of that clock (NTP, a person) moves a deadline.

No process compares a time of another host with its own. A router writes into its envelopes when they expire, by its own
clock, and tells the nodes what its clock shows (`ControlMessage.sent_at`); a node keeps the difference per router
(`node.router_clocks`). Redis could tell the time, RabbitMQ cannot, and this works with both.
"""

from __future__ import annotations

import time

_BEGAN = time.time() - time.monotonic()


def now() -> float:
    return _BEGAN + time.monotonic()
