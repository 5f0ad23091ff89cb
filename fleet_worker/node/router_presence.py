"""Asks the broker whether a router still listens (`broker.presence`). If it does not, its requests are not started, and
cancelled when they run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kombu import Connection

from fleet_worker.broker.connection import call_when_opened_again, open_channel, receive
from fleet_worker.broker.presence import Sight, look_for
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import Transport
from fleet_worker.errors import ReplyLost
from fleet_worker.node.running_attempts import RunningAttempts

log = logging.getLogger(__name__)

CHECK_EVERY = 0.75
"""Seconds between two questions about the routers that requests run for, and for which an answer is used again."""
GONE_AFTER = 0.75
"""Seconds without a connection after which a router counts as dead. One that reconnects needs 0.1 to 0.3 s."""
DOUBT_EVERY = 0.2
"""Seconds between two questions about a router that is not connected."""
ANSWER_WITHIN = 1.5
"""Seconds that a task waits for a decision."""
TRUSTED_FOR = 10.0
"""Seconds after an outage of the broker in which a router that was not seen since counts as listening: it has to
reconnect, too."""
SETTLED_AFTER = 2.0
"""Seconds after an outage from which it counts that a router is seen: connections are lost one after the other."""


@dataclass(slots=True)
class _Seen:
    """What the broker said of one router. Times are time.monotonic() seconds."""

    sight: Sight
    at: float
    since: float
    """Since when all answers have been the same."""
    was_here: bool
    """Whether it was here when the last outage of the broker had been over for a while."""

    @property
    def is_doubted(self) -> bool:
        """Whether it may be reconnecting."""
        return self.sight == "away" and self.at - self.since < GONE_AFTER


class RouterPresence:
    """Asks with one thread and one connection. Cancels what runs for a router that is not connected any more, and,
    after `abandoned_after` seconds, for one that is connected and silent. Only seconds in which the broker did answer
    count, and none soon after an outage of the broker.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        transport: Transport,
        running: RunningAttempts,
        *,
        abandoned_after: float,
    ) -> None:
        self._transport = transport
        self._running = running
        self._abandoned_after = abandoned_after
        self._changed = threading.Condition()
        self._seen: dict[str, _Seen] = {}
        self._questions: set[str] = set()
        self._is_connected = False
        self._trusted_until: float | None = None
        """Until when routers that were not seen yet count as listening; None before the first connection."""
        self._settled_at = 0.0
        self._thread = ReconnectingThread("routers", connect, self._keep_asking)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float = 0.0) -> None:
        with self._changed:
            self._thread.closed.set()
            self._changed.notify_all()
        self._thread.close(timeout)

    def listens(self, reply_to: str) -> bool:
        """Return False only if the broker confirms that nobody consumes the reply queue. Without an answer return True:
        wasted work is better than a refused request.

        An answer of the last `CHECK_EVERY` seconds is used again. A router that may be reconnecting is waited for.
        """
        with self._changed:
            if self._verdict(reply_to) is None:
                self._questions.add(reply_to)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._verdict(reply_to) is not None, ANSWER_WITHIN)
            return self._verdict(reply_to) is not False

    def _verdict(self, reply_to: str) -> bool | None:
        """Return whether this router listens, None if that has to be asked, or asked again."""
        seen = self._seen.get(reply_to)
        if not self._is_connected:
            return True
        if seen is None or time.monotonic() - seen.at >= CHECK_EVERY:
            return None
        if seen.sight == "here" or self._trusts(seen):
            return True
        return None if seen.is_doubted else False

    def _trusts(self, seen: _Seen) -> bool:
        return not seen.was_here and time.monotonic() < (self._trusted_until or 0.0)

    def _keep_asking(self, connection: Connection) -> None:
        channel = open_channel(connection)
        call_when_opened_again(channel, self._forget)
        with self._changed:
            self._questions.clear()
            self._is_connected = True
        self._forget(channel)
        try:
            next_check = time.monotonic()
            while not self._thread.closed.is_set():
                asked = self._next_questions(next_check)
                if time.monotonic() >= next_check:
                    asked |= self._running.routers
                    next_check = time.monotonic() + CHECK_EVERY
                    if self._transport == "amqp":  # or RabbitMQ would close a connection on which nothing is asked
                        receive(connection, 0.01)
                        connection.heartbeat_check()
                if asked:
                    self._learn(look_for(channel, self._transport, asked))
        finally:
            with self._changed:
                self._is_connected = False
                self._changed.notify_all()

    def _forget(self, _: object) -> None:
        """The connection is a new one: routers may have lost theirs, too."""
        with self._changed:
            self._seen = {}
            if self._trusted_until is None:
                self._trusted_until = self._settled_at = 0.0
            else:
                self._trusted_until = time.monotonic() + TRUSTED_FOR
                self._settled_at = time.monotonic() + SETTLED_AFTER

    def _next_questions(self, until: float) -> set[str]:
        """Wait for questions of tasks, at most until then, or until a router that is not connected is due again."""
        with self._changed:
            now = time.monotonic()
            self._seen = {reply_to: seen for reply_to, seen in self._seen.items() if now - seen.at < 2 * CHECK_EVERY}
            again = {reply_to: seen.at + DOUBT_EVERY for reply_to, seen in self._seen.items() if seen.is_doubted}
            wait = min([until, *again.values()]) - now
            self._changed.wait_for(lambda: self._questions or self._thread.closed.is_set(), max(0.0, wait))
            asked, self._questions = self._questions, set()
            return asked | {reply_to for reply_to, due in again.items() if due <= time.monotonic()}

    def _learn(self, sights: dict[str, Sight]) -> None:
        now = time.monotonic()
        self._thread.works()
        with self._changed:
            for reply_to, sight in sights.items():
                seen = self._seen[reply_to] = _updated(self._seen.get(reply_to), sight, now)
                seen.was_here |= sight == "here" and now >= self._settled_at
            self._changed.notify_all()
        for reply_to in sights:
            self._stop_if_gone(reply_to, self._seen[reply_to])

    def _stop_if_gone(self, reply_to: str, seen: _Seen) -> None:
        patience = {"here": float("inf"), "silent": self._abandoned_after, "away": GONE_AFTER}[seen.sight]
        if seen.at - seen.since < patience or self._trusts(seen):
            return
        if cancelled := self._running.stop(not_listening, reply_to=reply_to):
            log.warning("a router does not listen any more: its %d running requests were cancelled", cancelled)


def not_listening() -> ReplyLost:
    """Return a retryable error: a router that was only frozen will try again."""
    return ReplyLost("the router does not listen", retryable=True)


def _updated(before: _Seen | None, sight: Sight, now: float) -> _Seen:
    """Start counting again after a time in which the broker, or this node, was frozen."""
    if before is None or before.sight != sight or now - before.at > CHECK_EVERY + ANSWER_WITHIN:
        return _Seen(sight, now, now, before is not None and before.was_here)
    return _Seen(sight, now, before.since, before.was_here)
