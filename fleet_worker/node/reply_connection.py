"""The node's connection to the reply queues: messages go through it one by one, and again if they may be lost."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kombu import Connection

from fleet_worker.broker import replies
from fleet_worker.broker.connection import Publisher
from fleet_worker.broker.faults import refusal
from fleet_worker.broker.outage import Outage
from fleet_worker.node.replay_buffer import ReplayBuffer

log = logging.getLogger(__name__)

TRIES = 5
"""Tries until a message that the broker refuses for good is dropped: it may be too large."""


class Message(NamedTuple):
    """The body of one broker message, with its reply queue."""

    reply_to: str
    body: bytes
    is_kept: bool
    """Whether it is sent again if it may be lost."""


class ReplyConnection:
    """Sends messages in the order in which they were added. For one thread at a time.

    On Redis the broker's answer to a message is read just before the next one is sent; only `settle`, about once a
    second, waits for it. Messages wait while the broker is away. When it comes back it may have lost some: those of the
    last seconds are sent again.
    """

    def __init__(self, connect: Callable[[], Connection], closing: threading.Event) -> None:
        self._publisher = Publisher(connect)
        self._closing = closing
        self._sender: replies.Sender | None = None
        self._messages: deque[Message] = deque()
        """Those that the broker has not confirmed."""
        self._is_sent = False
        """The first of them is sent, and its answer is not read yet."""
        self._error: Exception | None = None
        """Why `send_at_once` failed; the next `send_all` or `settle` waits for that, and tries again."""
        self._failing: Message | None = None
        """The message that failed last."""
        self._failures = 0
        """How often it failed in a row."""
        self._replay = ReplayBuffer()
        self._outage = Outage("replies: the broker", log)
        self.learned: Callable[[str, int], object] = lambda reply_to, waiting: None
        """Is called with the number of messages that wait in a reply queue."""
        self.refused: Callable[[], object] = lambda: None
        """Is called when the broker refuses a message."""

    def add(self, reply_to: str, body: bytes, *, is_kept: bool = True) -> None:
        """Add a message, which one of the methods below sends."""
        self._messages.append(Message(reply_to, body, is_kept))

    def is_free(self, reply_to: str) -> bool:
        """Return whether a message for this queue could be sent now without waiting."""
        try:
            return self._sender is not None and not self._unsent and self._sender.is_free(reply_to)
        except Exception as error:
            self._error = error
            return False

    def send_at_once(self) -> bool:
        """Send the first message; call it only after `is_free`, then it waits for nothing. Return False if there are
        more, or if it failed: then call `send_all`."""
        try:
            if self._is_sent:
                self._confirm()
            self._send()
        except Exception as error:
            self._error = error
        return not self._unsent

    def send_all(self) -> None:
        """Send all messages. While the broker is away, wait and try again; give up only if the node ends."""
        while self._unsent:
            self._go_on()

    def settle(self) -> None:
        """As `send_all`, and wait until the broker has confirmed the last one."""
        while self._messages:
            self._go_on()

    def send_again(self, reply_queues: set[str]) -> None:
        """Send the last messages to these queues again: their routers may have missed them."""
        self.settle()
        self._messages.extend(Message(*each, True) for each in self._replay.take(reply_queues))

    @property
    def is_settled(self) -> bool:
        """Whether the broker has all messages, and none would be sent again."""
        return not self._messages and not self._replay

    def recent(self) -> set[str]:
        """Return the reply queues to which something was sent that would be sent again."""
        return self._replay.reply_queues() | {message.reply_to for message in self._messages if message.is_kept}

    def close(self) -> None:
        self._publisher.close()

    @property
    def _unsent(self) -> bool:
        """Whether there is a message to send, or a failure to wait for."""
        return self._error is not None or len(self._messages) > (1 if self._is_sent else 0)

    def _go_on(self) -> None:
        """Send the next message or read its answer; if that fails, wait."""
        try:
            if self._error:
                raise self._error
            if self._is_sent:
                self._confirm()
            else:
                self._send()
        except Exception as error:
            self._error = None
            self._failed(error)

    def _send(self) -> None:
        message = self._messages[0]
        self._opened().send(message.reply_to, message.body)
        self._is_sent = True

    def _confirm(self) -> None:
        waiting = self._opened().confirm()
        self._is_sent = False
        self._outage.works()
        message = self._messages.popleft()
        if waiting is not None:
            self.learned(message.reply_to, waiting)
        if message.is_kept:
            self._replay.add(message.reply_to, message.body)

    def _opened(self) -> replies.Sender:
        self._sender = self._sender or replies.sender_on(self._publisher.channel)
        return self._sender

    def _failed(self, error: Exception) -> None:
        """Wait before the next try, which begins with what the broker may have lost."""
        self._is_sent, self._sender = False, None
        self._publisher.drop()
        closing = self._closing.wait(self._outage.failed(error))
        if known := refusal(error):
            self.refused()
        refused = not isinstance(error, self._publisher.connection_errors) and not (known and known.passes)
        failing = self._messages[0] if self._messages else None
        self._failures = self._failures + 1 if failing is self._failing else 1
        self._failing = failing
        if self._failures >= TRIES and (closing or refused):
            self._give_up("the node ends" if closing else f"refused, {type(error).__name__}", all_of_them=closing)
        else:
            self._messages.extendleft(Message(*each, True) for each in reversed(self._replay.take()))

    def _give_up(self, reason: str, *, all_of_them: bool) -> None:
        log.error("replies were given up: %s", reason)
        if all_of_them:
            self._messages.clear()
        elif self._messages:
            self._messages.popleft()
