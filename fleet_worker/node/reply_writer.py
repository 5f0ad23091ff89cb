"""The reply to one attempt, as its task writes it.

The frames of an attempt are numbered without a gap. The last one is a response or an error, and only these end a reply.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from fleet_worker.errors import FleetError, RequestTimeout
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.protocol.reply import Accepted, ChatResponse, Delta, Deltas, EmbedResponse, Failure, Frame

ACCEPTED_WITHIN = 0.010
"""Seconds that an accepted frame may wait for the next one, to travel with it."""


class Publisher(Protocol):
    """What a writer uses of the `ReplyPublisher`."""

    node: str

    def append(self, writer: ReplyWriter, frame: Frame, *, delay: float | None) -> None: ...

    def wait_for_room(self, deadline: float, cancel_token: CancelToken) -> bool: ...

    def wake_up(self) -> None: ...


class ReplyWriter:
    """Writes the reply to one attempt, from the thread of its task."""

    def __init__(self, publisher: Publisher, request_id: str, attempt: int, reply_to: str) -> None:
        self._publisher = publisher
        self.id = request_id
        self.attempt = attempt
        self.reply_to = reply_to
        self.deadline = time.monotonic() + 3600.0
        self.appended = 0
        """How many frames the publisher has. The next one gets this number."""
        self._cancel_token = CancelToken()

    @contextmanager
    def cancelled_by(self, cancel_token: CancelToken) -> Iterator[None]:
        """Within this block a cancel ends every wait, which then raises the token's error."""
        self._cancel_token = cancel_token
        with cancel_token.on_cancel(self._publisher.wake_up):
            yield

    def accept(self, *, at_once: bool = False, **fields: Any) -> None:
        """Tell the router which instance accepted the attempt: at once, or with the next frame."""
        self._wait_for_room()
        self._publisher.append(self, Accepted(**self._next(), **fields), delay=0.0 if at_once else ACCEPTED_WITHIN)

    def put(self, deltas: list[Delta], tokens: int) -> None:
        """Append deltas, with which the answer has about so many tokens; the first ones are published at once.

        Waits while too many frames are pending, so that the MLX server's stream is not read meanwhile.

        Raises:
            RequestTimeout: the broker took nothing until the deadline.
            FleetError: the attempt was cancelled.
        """
        self._wait_for_room()
        first = self.appended <= 1
        frame = Deltas(**self._next(), deltas=deltas, tokens=tokens)
        self._publisher.append(self, frame, delay=0.0 if first else None)

    def end(self, frame: type[ChatResponse] | type[EmbedResponse], **fields: Any) -> None:
        self._publisher.append(self, frame(**self._next(), node=self._publisher.node, **fields), delay=0.0)

    def fail(self, error: FleetError) -> None:
        self._publisher.append(self, Failure.of(error, self.id, self.attempt, self._next()["seq"]), delay=0.0)

    def _wait_for_room(self) -> None:
        """Wait before the frame gets its number: a number that is never sent would be missing before the error."""
        if not self._publisher.wait_for_room(self.deadline, self._cancel_token):
            raise self._cancel_token.error or RequestTimeout("the broker took no replies until the deadline")

    def _next(self) -> dict[str, Any]:
        return {"id": self.id, "attempt": self.attempt, "seq": self.appended}
