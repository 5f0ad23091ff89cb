"""Does a router still listen? If nobody waits for an answer, the work for it is not begun, and not gone on with.

On Redis a router keeps a key alive while it listens; on RabbitMQ its reply queue has a consumer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from amqp.exceptions import NotFound
from kombu import Connection

from fleet_worker.broker.connection import open_channel
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import Transport, listening_key
from fleet_worker.errors import ReplyLost
from fleet_worker.node.running_attempts import RunningAttempts

log = logging.getLogger(__name__)

LOOK_EVERY = 2.0
"""Seconds between two looks at the routers that something runs for."""
BELIEVED = {True: 5.0, False: 0.25}
"""Seconds for which it counts that a router listens, or does not: one that was frozen may be back at any moment."""
ANSWER_WITHIN = 1.0
"""Seconds that a task waits for the answer."""
TRUSTED_FOR = 10.0
"""Seconds after an outage of the broker in which everybody counts as listening: routers have to come back too."""


@dataclass(slots=True)
class _Seen:
    """One router: what the broker said at `moment`, and since when it has said without a break that nobody listens."""

    listens: bool
    moment: float
    silent_since: float | None


class RouterPresence:
    """One thread and one connection. What runs for a router is stopped when nobody has listened for `abandoned_after`
    seconds, in which the broker did answer, and not right after an outage of the broker.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        transport: Transport,
        running: RunningAttempts,
        *,
        abandoned_after: float,
    ) -> None:
        self._ask = _key_is_there if transport == "redis" else _queue_is_consumed
        self._running = running
        self._abandoned_after = abandoned_after
        self._changed = threading.Condition()
        self._seen: dict[str, _Seen] = {}
        self._questions: set[str] = set()
        self._answering = False
        self._trusted_until = 0.0
        self._began = False
        self._link = ReconnectingThread("routers", connect, self._look)

    def start(self) -> None:
        self._link.start()

    def close(self, timeout: float = 0.0) -> None:
        with self._changed:
            self._link.closed.set()
            self._changed.notify_all()
        self._link.close(timeout)

    def listens(self, reply_to: str) -> bool:
        """Tell whether somebody listens there. It does as long as the broker does not say otherwise within a second:
        better to work for nobody than not to work for somebody.
        """
        with self._changed:
            if self._answering and self._known(reply_to) is None:
                self._questions.add(reply_to)
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._answering or self._known(reply_to), ANSWER_WITHIN)
            seen = self._known(reply_to)
            return not self._answering or seen is None or seen.listens or self._trusts_all()

    def _trusts_all(self) -> bool:
        return time.monotonic() < self._trusted_until

    def _known(self, reply_to: str) -> _Seen | None:
        seen = self._seen.get(reply_to)
        return seen if seen and time.monotonic() - seen.moment < BELIEVED[seen.listens] else None

    def _look(self, connection: Connection) -> None:
        channel = open_channel(connection)
        self._begin()
        try:
            next_look = time.monotonic()
            while not self._link.closed.is_set():
                asked = self._asked(next_look)
                if time.monotonic() >= next_look:
                    asked |= self._running.routers
                    next_look = time.monotonic() + LOOK_EVERY
                for reply_to in asked:
                    self._learn(reply_to, self._ask(channel, reply_to))
        finally:
            with self._changed:
                self._answering = False
                self._changed.notify_all()

    def _begin(self) -> None:
        """What was known before an outage does not count any more."""
        with self._changed:
            self._seen.clear()
            self._questions.clear()
            self._answering = True
            self._trusted_until = time.monotonic() + TRUSTED_FOR if self._began else 0.0
            self._began = True

    def _asked(self, until: float) -> set[str]:
        """The questions of tasks, as soon as there are any."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._questions or self._link.closed.is_set(), max(0.0, until - time.monotonic())
            )
            asked, self._questions = self._questions, set()
            self._forget_old()
        return asked

    def _learn(self, reply_to: str, listens: bool) -> None:
        now = time.monotonic()
        self._link.works()
        with self._changed:
            before = self._seen.get(reply_to)
            self._seen[reply_to] = seen = _Seen(listens, now, None if listens else _silent_since(before, now))
            self._changed.notify_all()
        silent = 0.0 if seen.silent_since is None else now - seen.silent_since
        if silent >= self._abandoned_after and not self._trusts_all():
            self._abandon(reply_to)

    def _abandon(self, reply_to: str) -> None:
        if stopped := self._running.stop(not_listening, reply_to=reply_to):
            log.warning("a router does not listen any more: what ran for it was stopped (%d)", stopped)

    def _forget_old(self) -> None:
        oldest = time.monotonic() - BELIEVED[True]
        self._seen = {reply_to: seen for reply_to, seen in self._seen.items() if seen.moment >= oldest}


def not_listening() -> ReplyLost:
    """A router that was only frozen tries again."""
    return ReplyLost("the router does not listen", retryable=True)


def _silent_since(before: _Seen | None, now: float) -> float:
    """Patience begins anew after a time in which the broker, or this node, was frozen."""
    if before is None or before.silent_since is None or now - before.moment > LOOK_EVERY + ANSWER_WITHIN:
        return now
    return before.silent_since


def _key_is_there(channel: Any, reply_to: str) -> bool:
    with channel.conn_or_acquire() as client:
        return bool(client.exists(listening_key(reply_to)))


def _queue_is_consumed(channel: Any, reply_to: str) -> bool:
    try:
        return bool(channel.queue_declare(reply_to, passive=True).consumer_count)
    except NotFound:  # the channel is closed by it, and opens again by itself
        return False
