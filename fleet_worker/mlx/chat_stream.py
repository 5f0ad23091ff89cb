"""The answer to a chat: as a stream of deltas, and how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from fleet_worker.errors import ConnectionFailure, MalformedOutput, ProviderError
from fleet_worker.mlx.body import body_of
from fleet_worker.mlx.chunks import ChunkReader
from fleet_worker.mlx.error_mapping import HTTPX_EXCEPTIONS, error_of_exception
from fleet_worker.mlx.events import EventParser
from fleet_worker.mlx.profiles import ServerProfile, normalised_finish_reason
from fleet_worker.mlx.reasoning import ReasoningSplitter
from fleet_worker.mlx.timeouts import RequestTimer
from fleet_worker.protocol.reply import Delta, Usage

_FINISH_SECONDS = 5.0
"""How long a server may go on after the finish_reason, until [DONE] or the end of the stream."""
_MOST_TOKENS = 1_000_000
"""Of one answer; as many as a request may ask for."""
_MOST_CHARACTERS = 8_000_000
"""Of one answer."""
_MOST_IDLE_BYTES = 16 * 1024 * 1024
"""Of heartbeats in a row. A server sends a few bytes of them in a second."""


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """How a chat ended, and its text unless it was streamed."""

    finish_reason: str
    usage: Usage
    ttft: float | None = None
    """Seconds from the request to its first content."""
    tokens_per_second: float | None = None
    stop_string: str | None = None
    """The one that ended it, if the node saw that."""
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class ServerStream:
    """An open stream of an MLX server. Each iteration returns the deltas that arrived together."""

    def __init__(
        self,
        response: httpx.Response,
        timer: RequestTimer,
        profile: ServerProfile,
        splitter: ReasoningSplitter | None,
        *,
        max_tokens: int,
        may_be_empty: bool = False,
    ) -> None:
        """`may_be_empty`: an answer without any token is a success, since its beginning was delivered before, or a stop
        string may have ended it."""
        self._response = response
        self._timer = timer
        self._profile = profile
        self._max_tokens = max_tokens
        self._may_be_empty = may_be_empty
        self._events = EventParser()
        self._chunks = ChunkReader(splitter)
        self._finish_reason = "stop"
        self._is_finishing = False
        self._idle_bytes = 0
        self._first: float | None = None
        self._last = timer.started

    def __iter__(self) -> Iterator[list[Delta]]:
        """Iterate over the deltas.

        Raises:
            FleetError: the stream was not complete. It needs a known finish_reason, a token, no error, and [DONE] from
                servers that send it.
        """
        try:
            yield from self._received()
        except HTTPX_EXCEPTIONS as error:
            if not self._overran:
                raise error_of_exception(error, self._timer) from None
        last = [*self._last_event(), *self._chunks.end()]
        self._check_complete()
        if last:
            self._content_received()
            yield last

    @property
    def tokens(self) -> int:
        """Number of tokens of the answer so far, assuming that the server sends a chunk for each."""
        return self._chunks.tokens

    def _received(self) -> Iterator[list[Delta]]:
        chunks, feed = self._chunks, self._events.feed
        for received in body_of(self._response):
            if deltas := chunks.read(feed(received)):
                self._content_received()
                yield deltas
            if chunks.failure:
                raise chunks.failure
            if chunks.done or chunks.overruns:
                return
            if chunks.finish_reason is not None:
                self._limit_rest()
            elif chunks.moved:
                self._timer.restart_gap()
                self._idle_bytes = 0
            else:
                self._no_progress(len(received))
            if chunks.tokens > _MOST_TOKENS or chunks.characters > _MOST_CHARACTERS:
                raise MalformedOutput("the MLX server sends an answer that is too large")

    def _no_progress(self, size: int) -> None:
        """Take so many bytes of comments and other heartbeats, or of a part of an event."""
        self._timer.check()
        if self._profile.tells_progress:
            self._timer.progressed()
        self._idle_bytes += size
        if self._idle_bytes > _MOST_IDLE_BYTES:
            raise MalformedOutput("the MLX server sends heartbeats without end")

    def _limit_rest(self) -> None:
        if not self._is_finishing:
            self._is_finishing = True
            self._timer.check()
            self._timer.limit_rest(_FINISH_SECONDS)

    def _content_received(self) -> None:
        self._last = self._timer.content_received()
        self._first = self._first or self._last

    def _last_event(self) -> list[Delta]:
        events = self._events.end()
        if self._events.is_whole:
            self._timer.check()
            return self._chunks.read_whole(*events)
        with contextlib.suppress(MalformedOutput):  # half an event: the connection broke in the middle of it
            return self._chunks.read(events)
        return []

    @property
    def _overran(self) -> bool:
        """The answer is complete, but its server did not come to an end."""
        timer, chunks = self._timer, self._chunks
        was_cut = timer.error is not None and timer.cancel_error is None
        return chunks.overruns or (chunks.finish_reason is not None and was_cut)

    def _check_complete(self) -> None:
        chunks, overran = self._chunks, self._overran
        if not chunks.done and not overran:
            self._timer.check()  # where the end of the connection ends a stream, a cut looks like a regular end
        if not chunks.finish_reason or (self._profile.sends_done and not chunks.done and not overran):
            raise ConnectionFailure("the MLX server ended the stream before the answer was complete")
        self._finish_reason = normalised_finish_reason(
            chunks.finish_reason, self._profile, tokens=chunks.usage.completion_tokens, max_tokens=self._max_tokens
        )
        if chunks.has_nameless_call and self._finish_reason != "length":
            raise MalformedOutput("the MLX server sent a tool call without a name")
        if not (chunks.has_tokens or chunks.usage.completion_tokens or self._may_be_empty):
            raise ProviderError("the MLX server ended its answer without any token", retryable=True)

    def answer(self) -> ChatAnswer:
        """Return how the stream ended, without its text. If it was not read to its end, finish_reason is "stop"."""
        tokens = self._chunks.usage.completion_tokens
        elapsed = self._last - (self._first or self._last)
        return ChatAnswer(
            finish_reason=self._finish_reason,
            usage=self._chunks.usage,
            ttft=self._first and self._first - self._timer.started,
            tokens_per_second=(tokens - 1) / elapsed if tokens and tokens > 1 and elapsed > 0 else None,
        )
