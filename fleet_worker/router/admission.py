"""How many requests may wait in a lane, and for how long: a request beyond that is refused before it is sent."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from kombu import Producer

from fleet_worker.broker import queue_depth
from fleet_worker.broker.faults import BROKER_ERRORS
from fleet_worker.broker.topology import EXCHANGE, Transport
from fleet_worker.errors import Cancelled, FleetSaturated
from fleet_worker.protocol.request import Priority
from fleet_worker.router.queue_wait import LaneLoad, Place, estimate, seconds_each

ANSWER_WITHIN = 1.0
"""Seconds that the broker has for an answer; if it gave none, it is not asked again for as long."""
ASK_EVERY_NEAR = 0.25
ASK_EVERY_FAR = 1.0
"""Seconds between two questions about one lane: when it may be half full or fuller, and when it is less."""
DEPTH_IS_FRESH = 0.25
"""Seconds for which one answer serves all requests that wait in a lane: there may be a thousand of them."""
REORDERED_WITHIN = 1.0
"""Seconds within which requests may enter and leave a lane in another order than they were sent in."""
SMOOTHING = 0.2
"""The weight of the newest queue wait in the average."""
RETRY_AFTER_MIN, RETRY_AFTER_MAX = 1.0, 60.0
"""Bounds of `retry_after` in seconds."""


@dataclass(slots=True)
class _Lane:
    depth: int | None = None
    """The broker's last answer; None if it gave none."""
    sent: int = 0
    """Requests that this router has sent since then. A free node may have accepted some at once."""
    asked_at: float = float("-inf")
    queue_wait: float | None = None
    """Smoothed seconds."""
    full_since: float | None = None
    """Time of the first answer that said so, if all since have said the same."""
    room_at: float = float("-inf")
    """When there is room for one more, after all that were refused so far have come back."""
    accepted_at: float = float("-inf")
    """When a node last accepted a request of this router."""
    latest_accepted: dict[Priority, float] = field(default_factory=dict)
    """Of those that were accepted: when the one that was sent last was sent."""
    load: LaneLoad = field(default_factory=LaneLoad)
    """What tells how long a request would wait."""
    retry_at: dict[Priority, float] = field(default_factory=dict)
    """When the wait is expected to be short enough for one more, after all that were refused so far have come back."""
    count_slots: Callable[[], int] = lambda: 1
    """That of the last request."""

    @property
    def max_depth(self) -> int:
        """Requests that wait if no node has accepted any since the last answer."""
        return (self.depth or 0) + self.sent


class Admission:
    """Knows how many requests wait in the lanes that this router sends to. Safe for any number of threads.

    It asks the broker now and then, on a connection that it borrows from `producer`. What this router sends only makes
    it ask earlier; a request is refused only on the broker's answer. A broker that does not answer delays nothing: the
    submission finds out what is wrong. The bound is not exact: several threads or routers that send at the same time
    may exceed it.
    """

    def __init__(
        self,
        producer: Callable[[float], AbstractContextManager[Producer]],
        transport: Transport,
        *,
        max_waiting: int,
    ) -> None:
        self._producer = producer
        self._transport = transport
        self._max_waiting = max_waiting
        self._asking = threading.Lock()
        """One thread asks at a time."""
        self._silent_until = float("-inf")
        self._lanes: OrderedDict[str, _Lane] = OrderedDict()
        self._lock = threading.Lock()

    def admit(
        self,
        lane: str,
        priority: Priority = "normal",
        *,
        max_wait: float | None = None,
        count_slots: Callable[[], int] = lambda: 1,
        beside: str | None = None,
    ) -> Place:
        """Count a request that is about to be sent. `count_slots` tells how many slots are ready for this lane;
        `beside` is another lane that they serve, too.

        Raises:
            FleetSaturated: `max_waiting` requests wait in that lane, or this one would wait for more than `max_wait`
                seconds. `metadata["retry_after"]` is the estimated number of seconds until there is room for one more.
        """
        with self._lock:
            self._known(lane).count_slots = count_slots
        if self._is_due(lane, max_wait) and self._asking.acquire(blocking=False):
            try:
                self._ask(lane, ANSWER_WITHIN)
            finally:
                self._asking.release()
        with self._lock:
            known = self._known(lane)
            self._refuse(lane, known, priority, max_wait)
            known.sent += 1
            other = self._known(beside).load if beside else None
        return Place(known.load, self._lock, priority, time.monotonic(), other)

    def refuse(self, lane: str, priority: Priority, max_wait: float | None) -> None:
        """Raise `FleetSaturated` if that is certain by a fresh answer. This asks nobody, and counts nothing."""
        with self._lock:
            known = self._lanes.get(lane)
            if known and time.monotonic() < known.asked_at + DEPTH_IS_FRESH:
                self._refuse(lane, known, priority, max_wait)

    def enter(self, lane: str, priority: Priority) -> Place:
        """Count a further attempt of a request, which is sent in any case."""
        with self._lock:
            load = self._known(lane).load
        return Place(load, self._lock, priority, time.monotonic())

    def accepted(self, lane: str, queue_wait: float, priority: Priority, sent_at: float) -> None:
        """A node accepted a request that this router had sent at `sent_at`, after it waited `queue_wait` seconds."""
        with self._lock:
            known = self._known(lane)
            before = queue_wait if known.queue_wait is None else known.queue_wait
            known.queue_wait = before + SMOOTHING * (queue_wait - before)
            known.accepted_at = time.monotonic()
            known.latest_accepted[priority] = max(sent_at, known.latest_accepted.get(priority, sent_at))

    def is_served(self, lane: str) -> bool:
        """Return whether a node works on a request of this router that came from this lane."""
        with self._lock:
            known = self._lanes.get(lane)
            return known is not None and known.load.is_served

    def is_queued(self, lane: str, priority: Priority, sent_at: float, timeout: float) -> bool | None:
        """Return whether a request that was sent at `sent_at` may still be in its lane; None if the broker does not
        answer within `timeout` seconds.

        It is not if the lane is empty, or if a node accepted one that was sent later: lanes are first in, first out.
        """
        is_silent = time.monotonic() < self._silent_until  # there may be a hundred lanes to ask about
        depth = None if is_silent else self.depth(lane, timeout, max_age=DEPTH_IS_FRESH)
        if depth is None:
            return None
        with self._lock:
            overtaken = self._known(lane).latest_accepted.get(priority, sent_at) > sent_at + REORDERED_WITHIN
        return depth > 0 and not overtaken

    def depth(self, lane: str, timeout: float = ANSWER_WITHIN, *, max_age: float = 0.0) -> int | None:
        """Return how many requests wait in a lane, by an answer that is at most `max_age` seconds old; None if the
        broker does not answer within `timeout` seconds, or twice that while another thread asks."""
        with self._lock:
            known = self._known(lane)
            if time.monotonic() < known.asked_at + max_age:
                return known.depth
        if not self._asking.acquire(timeout=timeout):
            return None
        try:
            return self._ask(lane, timeout)
        finally:
            self._asking.release()

    def _is_due(self, lane: str, max_wait: float | None) -> bool:
        with self._lock:
            known, now = self._known(lane), time.monotonic()
            is_near = 2 * known.max_depth >= self._max_waiting or (max_wait is not None and known.max_depth > 0)
            every = ASK_EVERY_NEAR if is_near else ASK_EVERY_FAR
            if (known.depth or 0) < self._max_waiting <= known.max_depth:
                every = 0.0  # it may have become full
            return now >= max(known.asked_at + every, self._silent_until)

    def _ask(self, lane: str, timeout: float) -> int | None:
        with self._lock:
            known = self._known(lane)
            before, entered, count_slots = known.sent, known.load.entered, known.count_slots
        depths = self._ask_broker(lane, timeout)
        slots = count_slots()
        with self._lock:
            known = self._known(lane)
            known.asked_at = time.monotonic()
            known.sent -= before  # requests sent meanwhile are not in the answer
            known.depth = None if depths is None else sum(depths)
            if depths is not None and known.depth is not None:
                known.load.tell(depths, slots, entered, known.asked_at)
                known.full_since = (known.full_since or known.asked_at) if known.depth >= self._max_waiting else None
            return known.depth

    def _ask_broker(self, lane: str, timeout: float) -> tuple[int, ...] | None:
        try:
            with self._producer(timeout) as producer:
                return queue_depth.depths(producer.channel, self._transport, lane)
        except (*BROKER_ERRORS, Cancelled):
            self._silent_until = time.monotonic() + ANSWER_WITHIN
            return None

    def _known(self, lane: str) -> _Lane:
        known = self._lanes.setdefault(lane, _Lane())
        self._lanes.move_to_end(lane)
        if len(self._lanes) > queue_depth.MOST_LANES:
            self._lanes.popitem(last=False)
        return known

    def _refuse(self, lane: str, known: _Lane, priority: Priority, max_wait: float | None) -> None:
        """Raise `FleetSaturated` if the lane is full or too slow. Without an answer of the broker it is neither."""
        if known.depth is not None:
            self._refuse_if_full(lane, known)
            self._refuse_if_slow(lane, known, priority, max_wait)

    def _refuse_if_full(self, lane: str, known: _Lane) -> None:
        if (known.depth or 0) >= self._max_waiting:
            retry_after = self._room_after(known)
            text = (
                f"{known.depth} requests wait for {_subject(lane)}, and no more than {self._max_waiting} may "
                f"(router.max_waiting): try again in {retry_after:g} s, or let more nodes serve it"
            )
            raise FleetSaturated(text, retry_after=retry_after)

    def _refuse_if_slow(self, lane: str, known: _Lane, priority: Priority, max_wait: float | None) -> None:
        """Each further refused request is told to come one request later."""
        if max_wait is None:
            return
        now = time.monotonic()
        seen = known.load.seen(priority, now)
        if (wait := estimate(seen)) > max_wait:
            soon = max(known.retry_at.get(priority, now), now + wait - max_wait)
            known.retry_at[priority] = soon + seconds_each(seen)
            retry_after = _bounded(known.retry_at[priority] - now)
            text = (
                f"a request for {_subject(lane)} would wait about {wait:.2g} s, and this one may wait {max_wait:g} s "
                f"(max_wait): try again in {retry_after:g} s, or let more nodes serve it"
            )
            raise FleetSaturated(text, retry_after=retry_after)

    def _room_after(self, known: _Lane) -> float:
        """Estimate the seconds until there is room, by Little's law: if `depth` requests wait `queue_wait` seconds
        each, depth / queue_wait leave per second. Each further refused request is told to come one such step later. A
        lane that has been full for longer than this estimate is expected to stay full for as long again."""
        depth, now = known.depth or 1, time.monotonic()
        seconds_each = known.queue_wait / depth if known.queue_wait else RETRY_AFTER_MIN / self._max_waiting
        known.room_at = max(known.room_at, now + (depth - self._max_waiting) * seconds_each) + seconds_each
        full_for = now - max(known.full_since or now, known.accepted_at)
        return _bounded(max(known.room_at - now, full_for))


def _bounded(retry_after: float) -> float:
    return round(min(max(retry_after, RETRY_AFTER_MIN), RETRY_AFTER_MAX), 3)


def _subject(lane: str) -> str:
    """Return what a lane is for, without the name of a node."""
    capability, _, model = lane.removeprefix(f"{EXCHANGE.name}.").partition(".")
    model = model.partition("_")[0] or "that model"  # without the hash
    return "that node" if capability == "node" else f"{capability} of {model}"
