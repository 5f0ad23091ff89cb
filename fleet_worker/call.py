"""One request under way, for a thread or an asyncio task: its attempts, its frames, its end."""

from __future__ import annotations

import asyncio
import queue
import random
import time
from collections.abc import Callable
from typing import Self, cast

from fleet_worker.errors import Expired, FleetError, RequestTimeout
from fleet_worker.frames import Accepted, ChatResponse, EmbedResponse, Failure, Frame
from fleet_worker.mailbox import Mailbox
from fleet_worker.messages import FleetRequest
from fleet_worker.replies import ReplyInbox

__all__ = ["Call"]

RETRY_AFTER = 0.2
"""Seconds before a second attempt, at most; twice as much before each further one."""


class Call:
    """Submitted on entering, read until its last frame, left behind on leaving.

    An attempt that failed in a way that another one may not is followed by another one, as long as nothing of the
    answer was seen. `begin` returns the inbox once the request may be sent, `publish` sends one attempt.
    """

    def __init__(
        self,
        request: FleetRequest,
        *,
        begin: Callable[[], ReplyInbox],
        publish: Callable[[FleetRequest], None],
        max_attempts: int,
    ) -> None:
        self._request = request
        self._begin = begin
        self._publish = publish
        self._max_attempts = max_attempts
        self._deadline = 0.0
        self._inbox: ReplyInbox | None = None
        self._begun = False
        self._accepted = False
        self._mailbox: Mailbox | None = None
        self._error: FleetError | None = None

    def __enter__(self) -> Self:
        if self._mailbox is None:
            inbox = self._inbox = self._begin()
            self._deadline = time.monotonic() + self._request.timeout_seconds
            self._request = self._request.submitted_to(inbox.name)
            self._submit(inbox)
        return self

    def __exit__(self, *_: object) -> None:
        if self._mailbox:
            self._mailbox.close()

    async def __aenter__(self) -> Self:
        if self._mailbox is None:
            await asyncio.to_thread(self.__enter__)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()

    def frame(self) -> Frame:
        """Return the next frame that is not bookkeeping; raises the error that ended the reply, every time."""
        while True:
            try:
                frame = None if self._error else self._box.get()
            except queue.Empty:
                frame = None
            if (pause := self._pause_before_another(frame)) is not None:
                time.sleep(pause)
                self._try_again()
            elif content := self._content(frame):
                return content

    async def aframe(self) -> Frame:
        while True:
            try:
                frame = None if self._error else await self._box.aget()
            except queue.Empty:
                frame = None
            if (pause := self._pause_before_another(frame)) is not None:
                await asyncio.sleep(pause)
                await asyncio.to_thread(self._try_again)
            elif content := self._content(frame):
                return content

    def result(self) -> ChatResponse | EmbedResponse:
        return cast(ChatResponse | EmbedResponse, self.frame())

    async def aresult(self) -> ChatResponse | EmbedResponse:
        return cast(ChatResponse | EmbedResponse, await self.aframe())

    @property
    def _box(self) -> Mailbox:
        if self._mailbox is None:
            raise RuntimeError("the request was not submitted: use it in a with block, or iterate it")
        return self._mailbox

    def _submit(self, inbox: ReplyInbox) -> None:
        self._mailbox = inbox.mailbox(self._request.request_id, self._request.attempt, deadline=self._deadline)
        try:
            self._publish(self._request)
        except FleetError as error:
            self._error = error
            raise

    def _pause_before_another(self, frame: Frame | None) -> float | None:
        """Return the seconds until the next attempt; None if there is none to be made."""
        if not isinstance(frame, Failure) or not frame.retryable or self._begun:
            return None
        attempt = self._request.attempt
        pause: float = random.uniform(0.5, 1.0) * RETRY_AFTER * 2 ** (attempt - 1)  # noqa: S311 - it spreads load
        if attempt >= self._max_attempts or time.monotonic() + pause >= self._deadline:
            return None
        return pause

    def _try_again(self) -> None:
        """The same request as its next attempt; what an older one still says is not listened to."""
        self._accepted = False
        self._request = self._request.model_copy(update={"attempt": self._request.attempt + 1})
        if self._inbox:
            self._submit(self._inbox)

    def _content(self, frame: Frame | None) -> Frame | None:
        """Return the frame if it holds anything of the answer. No frame means that time is over."""
        if isinstance(frame, Failure):
            self._error = frame.error()
        elif frame is None:
            self._error = self._error or self._late()
        if self._error:
            raise self._error
        self._accepted = True
        if isinstance(frame, Accepted):
            return None
        self._begun = True
        return frame

    def _late(self) -> FleetError:
        seconds = self._request.timeout_seconds
        if self._accepted:
            return RequestTimeout(f"the answer was not complete within its timeout of {seconds:g} s")
        return Expired(
            f"no node took the request within its timeout of {seconds:g} s: none serves {self._request.operation} of "
            "that model, or all are busy or cut off"
        )
