"""How much may wait in a lane: what is too much for it is refused before it is sent."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from celery import Celery

from fleet_worker.broker import queue_depth as lane_depths
from fleet_worker.broker.connection import BROKER_ERRORS, connect
from fleet_worker.broker.topology import EXCHANGE, Transport
from fleet_worker.errors import FleetSaturated
from fleet_worker.protocol.request import Priority

ANSWER_WITHIN = 1.0
"""Seconds that the broker has for each answer, and for which it is left alone if it did not give one."""
NEAR_EVERY = 0.25
FAR_EVERY = 1.0
"""Seconds between two looks at one lane: while half of what may wait does, perhaps; and while it is less."""
LANE_KNOWN = 0.25
"""Seconds for which one look at a lane is enough for all that wait in it: there may be a thousand of them."""
IN_ANY_ORDER = 1.0
"""Seconds in which requests may come into a lane, and out of it, in another order than they were sent in."""
SMOOTHING = 0.2
"""The weight of the newest queue wait among all of them."""
SOONEST, LATEST, UNKNOWN = 0.1, 60.0, 1.0
"""Bounds of `retry_after`, and what it is when no request of this router was taken from that lane yet: seconds."""


@dataclass(slots=True)
class _Lane:
    depth: int | None = None
    """As the broker said when it was asked last; None if it did not say."""
    sent: int = 0
    """By this router since then; nodes may have taken it at once, so that it never waited."""
    asked_at: float = float("-inf")
    queue_wait: float | None = None
    full_since: float | None = None
    """When the broker first said so, if it has said nothing else since."""
    taken_at: float = float("-inf")
    """When a node last took a request of this router."""
    served: dict[Priority, float] = field(default_factory=dict)
    """When the latest of those that were taken was sent."""

    @property
    def most(self) -> int:
        """So many wait, or fewer."""
        return (self.depth or 0) + self.sent


class Admission:
    """What waits in the lanes that a router sends to. Safe for any number of threads.

    The broker is asked now and then, on a connection of its own, which is opened at the first need; what this router
    sends makes it be asked earlier, but only the broker's word refuses anything. A broker that does not answer holds
    nobody up: the submission itself finds out what is wrong. The bound is not exact: what several threads or routers
    send at the same moment may go beyond it.
    """

    def __init__(self, app: Celery, transport: Transport, *, max_waiting: int) -> None:
        self._transport = transport
        self._max_waiting = max_waiting
        self._connection = app.connection_for_read()
        self._asking = threading.Lock()
        """Of whoever uses the connection."""
        self._closed = False
        self._silent_until = float("-inf")
        self._lanes: OrderedDict[str, _Lane] = OrderedDict()
        self._changing = threading.Lock()

    def admit(self, lane: str) -> None:
        """Count a request that is about to be sent.

        Raises:
            FleetSaturated: `max_waiting` requests wait in that lane; `metadata["retry_after"]` is the seconds until
                there is room for one more, estimated by how fast the lane was served until now.
        """
        if self._due(lane) and self._asking.acquire(blocking=False):
            try:
                self._ask(lane, ANSWER_WITHIN)
            finally:
                self._asking.release()
        with self._changing:
            known = self._known(lane)
            if known.depth is not None and known.depth >= self._max_waiting:
                raise self._saturated(lane, known)
            known.sent += 1

    def accepted(self, lane: str, queue_wait: float, priority: Priority, sent_at: float) -> None:
        """Note that a node has taken a request that this router sent at that monotonic time, and that it had waited in
        that lane for so many seconds."""
        with self._changing:
            known = self._known(lane)
            before = queue_wait if known.queue_wait is None else known.queue_wait
            known.queue_wait = before + SMOOTHING * (queue_wait - before)
            known.taken_at = time.monotonic()
            known.served[priority] = max(sent_at, known.served.get(priority, sent_at))

    def waits(self, lane: str, priority: Priority, sent_at: float, timeout: float) -> bool | None:
        """Tell whether a request that was sent at that monotonic time may still be in its lane; None if the broker does
        not say within `timeout` seconds.

        It is not if the lane is empty, or if one that was sent later was taken: lanes are first in, first out.
        """
        depth = self.depth(lane, timeout, max_age=LANE_KNOWN)
        if depth is None:
            return None
        with self._changing:
            overtaken = self._known(lane).served.get(priority, sent_at) > sent_at + IN_ANY_ORDER
        return depth > 0 and not overtaken

    def depth(self, lane: str, timeout: float = ANSWER_WITHIN, *, max_age: float = 0.0) -> int | None:
        """Ask how many requests wait in a lane, unless somebody has in the last `max_age` seconds; None if the broker
        does not tell within `timeout` seconds, which may become twice that while another thread asks."""
        with self._changing:
            known = self._known(lane)
            if time.monotonic() < known.asked_at + max_age:
                return known.depth
        if not self._asking.acquire(timeout=timeout):
            return None
        try:
            return self._ask(lane, timeout)
        finally:
            self._asking.release()

    def close(self) -> None:
        """Nothing is asked any more, and everything admitted."""
        with self._asking:
            self._closed = True
            self._connection.release()

    def _due(self, lane: str) -> bool:
        with self._changing:
            known, now = self._known(lane), time.monotonic()
            every = NEAR_EVERY if 2 * known.most >= self._max_waiting else FAR_EVERY
            if (known.depth or 0) < self._max_waiting <= known.most:
                every = 0.0  # before anybody is refused
            return now >= max(known.asked_at + every, self._silent_until)

    def _ask(self, lane: str, timeout: float) -> int | None:
        """What is sent in the meantime is counted on top of the answer."""
        with self._changing:
            before = self._known(lane).sent
        depth = None if self._closed else self._told(lane, timeout)
        with self._changing:
            known = self._known(lane)
            known.asked_at = time.monotonic()
            known.depth, known.sent = depth, known.sent - before
            if depth is not None:
                known.full_since = (known.full_since or known.asked_at) if depth >= self._max_waiting else None
        return depth

    def _told(self, lane: str, timeout: float) -> int | None:
        try:
            channel = connect(self._connection, timeout).default_channel
            return lane_depths.depth(channel, self._transport, lane)
        except BROKER_ERRORS:
            self._connection.collect()
            self._silent_until = time.monotonic() + ANSWER_WITHIN
            return None

    def _known(self, lane: str) -> _Lane:
        known = self._lanes.setdefault(lane, _Lane())
        self._lanes.move_to_end(lane)
        if len(self._lanes) > lane_depths.MOST_LANES:
            self._lanes.popitem(last=False)
        return known

    def _saturated(self, lane: str, known: _Lane) -> FleetSaturated:
        retry_after = self._room_after(known)
        text = (
            f"{known.depth} requests wait for {_what(lane)}, and no more than {self._max_waiting} may "
            f"(router.max_waiting): try again in {retry_after:g} s, or let more nodes serve it"
        )
        return FleetSaturated(text, retry_after=retry_after)

    def _room_after(self, known: _Lane) -> float:
        """By Little's law: where `depth` requests wait for `queue_wait` seconds each, depth / queue_wait leave in each
        second. But it will not be sooner than it has lasted already."""
        depth, now = known.depth or 1, time.monotonic()
        by_speed = UNKNOWN
        if known.queue_wait is not None:
            by_speed = (depth - self._max_waiting + 1) * known.queue_wait / depth
        lasted = now - max(known.full_since or now, known.taken_at)
        return round(min(max(by_speed, lasted, SOONEST), LATEST), 3)


def _what(lane: str) -> str:
    capability, _, model = lane.removeprefix(f"{EXCHANGE.name}.").partition(".")
    return "that node" if capability == "node" else f"{capability} of {model}"
