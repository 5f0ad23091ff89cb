"""Asks the broker whether a router still consumes its reply queue. If it does not, its requests are not started, and
cancelled when they run.

On Redis a router keeps a key alive as long as it consumes. RabbitMQ counts the consumers of a queue.
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

from fleet_worker.broker.connection import hear, open_channel
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import Transport, listening_key
from fleet_worker.errors import ReplyLost
from fleet_worker.node.running_attempts import RunningAttempts

log = logging.getLogger(__name__)

CHECK_EVERY = 2.0
"""Seconds between two checks of the routers that requests run for."""
VALID_FOR = {True: 5.0, False: 0.25}
"""Seconds for which an answer, listens or not, is used again: a router that was frozen may be back at any time."""
ANSWER_WITHIN = 1.0
"""Seconds that a task waits for the answer."""
TRUSTED_FOR = 10.0
"""Seconds after an outage of the broker in which all routers count as listening: they have to reconnect, too."""


@dataclass(slots=True)
class _Answer:
    """What the broker said of one router. Times are time.monotonic() seconds."""

    listens: bool
    at: float
    silent_since: float | None
    """Since when all answers have been that nobody listens."""


class RouterPresence:
    """Asks with one thread and one connection. Cancels what runs for a router that has not listened for
    `abandoned_after` seconds in which the broker did answer, but not soon after an outage of the broker.
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
        self._sends_heartbeats = transport == "amqp"  # or RabbitMQ would close a connection on which nothing is asked
        self._running = running
        self._abandoned_after = abandoned_after
        self._changed = threading.Condition()
        self._answers: dict[str, _Answer] = {}
        self._questions: set[str] = set()
        self._is_connected = False
        self._trusted_until: float | None = None
        """Until when all routers count as listening; None before the first connection."""
        self._thread = ReconnectingThread("routers", connect, self._answer)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float = 0.0) -> None:
        with self._changed:
            self._thread.closed.set()
            self._changed.notify_all()
        self._thread.close(timeout)

    def listens(self, reply_to: str) -> bool:
        """Return False only if the broker confirms within one second that nobody consumes the reply queue. Without an
        answer return True: wasted work is better than a refused request.
        """
        with self._changed:
            if self._is_connected and self._valid(reply_to) is None:
                self._questions.add(reply_to)
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._is_connected or self._valid(reply_to), ANSWER_WITHIN)
            answer = self._valid(reply_to)
            return not self._is_connected or answer is None or answer.listens or self._trusts_all()

    def _trusts_all(self) -> bool:
        return time.monotonic() < (self._trusted_until or 0.0)

    def _valid(self, reply_to: str) -> _Answer | None:
        answer = self._answers.get(reply_to)
        return answer if answer and time.monotonic() - answer.at < VALID_FOR[answer.listens] else None

    def _answer(self, connection: Connection) -> None:
        channel = open_channel(connection)
        with self._changed:
            self._answers.clear()  # those from before an outage
            self._questions.clear()
            self._trusted_until = 0.0 if self._trusted_until is None else time.monotonic() + TRUSTED_FOR
            self._is_connected = True
        try:
            next_check = time.monotonic()
            while not self._thread.closed.is_set():
                asked = self._next_questions(next_check)
                if time.monotonic() >= next_check:
                    asked |= self._running.routers
                    next_check = time.monotonic() + CHECK_EVERY
                    if self._sends_heartbeats:
                        hear(connection, 0.01)
                        connection.heartbeat_check()
                for reply_to in asked:
                    self._learn(reply_to, self._ask(channel, reply_to))
        finally:
            with self._changed:
                self._is_connected = False
                self._changed.notify_all()

    def _next_questions(self, until: float) -> set[str]:
        """Wait for questions of tasks, at most until then."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._questions or self._thread.closed.is_set(), max(0.0, until - time.monotonic())
            )
            asked, self._questions = self._questions, set()
            oldest = time.monotonic() - VALID_FOR[True]
            self._answers = {reply_to: answer for reply_to, answer in self._answers.items() if answer.at >= oldest}
        return asked

    def _learn(self, reply_to: str, listens: bool) -> None:
        now = time.monotonic()
        self._thread.works()
        with self._changed:
            before = self._answers.get(reply_to)
            self._answers[reply_to] = answer = _Answer(listens, now, None if listens else _silent_since(before, now))
            self._changed.notify_all()
        silent = 0.0 if answer.silent_since is None else now - answer.silent_since
        if silent < self._abandoned_after or self._trusts_all():
            return
        if cancelled := self._running.stop(not_listening, reply_to=reply_to):
            log.warning("a router does not listen any more: its %d running requests were cancelled", cancelled)


def not_listening() -> ReplyLost:
    """Return a retryable error: a router that was only frozen will try again."""
    return ReplyLost("the router does not listen", retryable=True)


def _silent_since(before: _Answer | None, now: float) -> float:
    """Start counting again after a time in which the broker, or this node, was frozen."""
    if before is None or before.silent_since is None or now - before.at > CHECK_EVERY + ANSWER_WITHIN:
        return now
    return before.silent_since


def _key_is_there(channel: Any, reply_to: str) -> bool:
    with channel.conn_or_acquire() as client:
        return bool(client.exists(listening_key(reply_to)))


def _queue_is_consumed(channel: Any, reply_to: str) -> bool:
    try:
        return bool(channel.queue_declare(reply_to, passive=True).consumer_count)
    except NotFound:  # RabbitMQ closes the channel, which opens again by itself
        return False
