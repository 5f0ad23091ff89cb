"""The answer to a chat, as it streams from an MLX server and as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from fleet_worker.errors import ConnectionFailure, MalformedOutput
from fleet_worker.mlx.chunks import ChunkReader
from fleet_worker.mlx.error_mapping import foreign_errors_mapped, raw
from fleet_worker.mlx.profiles import ServerProfile, finish_reason
from fleet_worker.mlx.reasoning import ReasoningSplitter
from fleet_worker.mlx.sse import EventStream
from fleet_worker.mlx.timeouts import RequestTimer
from fleet_worker.protocol.reply import Delta, Usage


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """A whole chat; seconds are counted from the request to the server."""

    content: str | None
    reasoning: str | None
    tool_calls: list[dict[str, Any]]
    finish_reason: str
    usage: Usage
    ttft: float | None
    tokens_per_second: float | None


class ServerStream:
    """An open stream: iterate it for the deltas, as many at a time as arrived together."""

    def __init__(
        self,
        response: httpx.Response,
        clock: RequestTimer,
        quirks: ServerProfile,
        splitter: ReasoningSplitter | None,
        *,
        max_tokens: int,
    ) -> None:
        self._response = response
        self._clock = clock
        self._quirks = quirks
        self._max_tokens = max_tokens
        self._events = EventStream()
        self._chunks = ChunkReader(splitter)
        self._finish = "stop"
        self._first: float | None = None
        self._last = clock.started

    def __iter__(self) -> Iterator[list[Delta]]:
        """Raises a `FleetError` unless the stream was whole: a good finish_reason, no error, [DONE] where it is due."""
        with foreign_errors_mapped(self._clock):
            yield from self._arriving()
        last = [*self._unended(), *self._chunks.end()]
        self._check_whole()
        if last:
            self._arrived()
            yield last

    @property
    def tokens(self) -> int:
        """What the server sent of the answer so far, counted as it sent it: one by one, as a rule."""
        return self._chunks.pieces

    def _arriving(self) -> Iterator[list[Delta]]:
        for received in raw(self._response):
            events = self._events.feed(received)
            if deltas := self._chunks.read(events):
                self._arrived()
                yield deltas
            if self._chunks.done:
                return
            if events:  # a comment is no sign of progress
                self._clock.waiting()

    def _arrived(self) -> None:
        self._last = self._clock.content()
        self._first = self._first or self._last

    def _unended(self) -> list[Delta]:
        """The last event if the server closed right after it, without the blank line that ends it."""
        with contextlib.suppress(MalformedOutput):  # half an event: the connection broke in the middle of it
            return self._chunks.read(self._events.end())
        return []

    def _check_whole(self) -> None:
        said = self._chunks.finish
        if not self._chunks.done:
            self._clock.check()  # where the end of a stream is the end of its connection, a cut looks like an end
        if not said or (self._quirks.says_done and not self._chunks.done):
            raise ConnectionFailure("the MLX server ended the stream before the answer was whole")
        tokens = self._chunks.usage.completion_tokens
        self._finish = finish_reason(said, self._quirks, completion_tokens=tokens, max_tokens=self._max_tokens)

    def answer(
        self, content: str | None = None, reasoning: str | None = None, tool_calls: list[dict[str, Any]] | None = None
    ) -> ChatAnswer:
        """Return how the stream ended, with the given text of it. One that was left before counts as stopped."""
        tokens = self._chunks.usage.completion_tokens
        elapsed = self._last - (self._first or self._last)
        return ChatAnswer(
            content=content,
            reasoning=reasoning,
            tool_calls=tool_calls or [],
            finish_reason=self._finish,
            usage=self._chunks.usage,
            ttft=self._first and self._first - self._clock.started,
            tokens_per_second=(tokens - 1) / elapsed if tokens and tokens > 1 and elapsed > 0 else None,
        )
