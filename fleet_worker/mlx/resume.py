"""Continues an answer whose beginning was delivered by another server."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from fleet_worker.errors import (
    ConnectionFailure,
    FleetError,
    InvalidRequest,
    MalformedOutput,
    ProviderError,
    StreamInterrupted,
)
from fleet_worker.mlx.chat_stream import ChatAnswer, ServerStream
from fleet_worker.mlx.offering import Offering
from fleet_worker.mlx.overlap import OverlapFilter, before_last_word
from fleet_worker.mlx.profiles import ServerProfile, chat_body, continued_body
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.reply import Delta, Usage
from fleet_worker.protocol.request import Resume


@dataclass(frozen=True, slots=True)
class ResumeStrategy:
    """One way to continue: the request to the server, and how its output joins what was delivered."""

    body: dict[str, Any]
    overlap: OverlapFilter
    tokens_left: int | None
    """How many tokens may still follow; None if the server starts over, and so counts itself."""

    @property
    def exhausted(self) -> bool:
        return self.tokens_left is not None and self.overlap.new >= self.tokens_left


def resume_strategies(
    params: ChatParams, offering: Offering, profile: ServerProfile, resume: Resume
) -> list[ResumeStrategy]:
    """Return what to try, in this order, to continue an answer; an empty list if its tokens are used up.

    At temperature 0 the server starts over, and what equals the delivered text is dropped. Continuing would be quicker,
    but not exact: the tokens of the delivered text are not always those that were generated. Servers drop the space
    before the first word, for example, so that the same text begins with another token. Their number is not exact
    either: the server itself tells where the answer ends.

    At any other temperature the server continues before the last word that was delivered, or at the end of the text.

    Raises:
        StreamInterrupted: there is no strategy; retryable if another server may have one.
    """
    body = chat_body(params, offering, profile)
    if (params.response_format or {}).get("type", "text") != "text":
        raise StreamInterrupted("an answer in JSON is not continued")
    if body["temperature"] == 0:
        overlap = OverlapFilter("", again=resume.content, reasoning=resume.reasoning, stop=params.stop or ())
        return [ResumeStrategy(body, overlap, None)]
    tokens_left = body["max_tokens"] - (profile.length_shortfall or 0) - resume.tokens
    if tokens_left <= 0:
        return []
    strategies = list(_continuations(body, offering, profile, resume.content, tokens_left, params.stop or ()))
    if not strategies:
        # No server can continue reasoning alone.
        text = "this MLX server cannot continue what was delivered"
        raise StreamInterrupted(text, retryable=bool(resume.content))
    return strategies


def _continuations(
    body: dict[str, Any],
    offering: Offering,
    profile: ServerProfile,
    delivered: str,
    tokens_left: int,
    stop: Sequence[str],
) -> Iterator[ResumeStrategy]:
    # transformers drops white space at the end of a text that is continued, if the model's chat template does so.
    end = len(delivered if profile.continues_by == "template" else delivered.rstrip())
    word = min(before_last_word(delivered), end)
    for cut in sorted({word, end} - {0}):
        again, at_end = delivered[cut:], cut == end
        # A token is at least one byte, so this is enough for the text that is repeated.
        limit = tokens_left + (profile.length_shortfall or 0) + len(again.encode())
        limited = {**body, "max_tokens": limit}
        front = "  " if at_end else " "
        if continued := continued_body(limited, delivered[:cut], offering, profile, front=front):
            overlap = OverlapFilter(delivered, again=again, stop=stop, guess_space=at_end)
            yield ResumeStrategy(continued, overlap, tokens_left)


class ResumedStream:
    """The rest of an answer; used like a `ServerStream`, and closed at the end.

    `open_stream` opens the stream of a request; its second argument tells whether the answer starts from its beginning.
    `has_died` finds out whether the server has died, after a connection to it broke.
    """

    def __init__(
        self,
        strategies: list[ResumeStrategy],
        resume: Resume,
        open_stream: Callable[[dict[str, Any], bool], AbstractContextManager[ServerStream]],
        has_died: Callable[[], bool],
    ) -> None:
        self._has_died = has_died
        self._strategies = strategies
        self._resume = resume
        self._open_stream = open_stream
        self._current: tuple[ResumeStrategy, ServerStream] | None = None
        self._deltas = self._run()

    def __iter__(self) -> Iterator[list[Delta]]:
        """Raises what a `ServerStream` raises, or a retryable `StreamInterrupted` if no strategy was successful."""
        return self._deltas

    def close(self) -> None:
        self._deltas.close()

    @property
    def tokens(self) -> int:
        """Number of tokens of the answer so far, with those that were delivered before."""
        match self._current:
            case (ResumeStrategy(tokens_left=None), stream):
                return stream.tokens
            case (strategy, _):
                return self._resume.tokens + strategy.overlap.new
        return self._resume.tokens

    def _run(self) -> Generator[list[Delta], None, None]:
        for strategy in self._strategies:
            try:
                with self._open_stream(strategy.body, strategy.tokens_left is None) as stream:
                    self._current = strategy, stream
                    yield from self._new_deltas(strategy, stream)
            except FleetError as error:
                if strategy.overlap.new or not self._is_refusal(error, strategy):
                    raise
                continue
            if not strategy.overlap.differs:
                return
        if self._strategies:
            raise StreamInterrupted("the MLX server's answer does not continue what was delivered", retryable=True)

    def _is_refusal(self, error: FleetError, strategy: ResumeStrategy) -> bool:
        """Return True if the server refuses this strategy, which says nothing about its health: the next one is tried.

        It is not the caller's mistake either, since another server accepted the same request. Some servers answer 500
        to what they do not know, or nothing at all.
        """
        if isinstance(error, InvalidRequest):
            return True
        if strategy.tokens_left is None:  # an ordinary request
            return False
        return type(error) in (ProviderError, MalformedOutput) or (
            isinstance(error, ConnectionFailure) and not self._has_died()
        )

    def _new_deltas(self, strategy: ResumeStrategy, stream: ServerStream) -> Iterator[list[Delta]]:
        overlap = strategy.overlap
        for deltas in stream:
            new: list[Delta] = []
            for delta in deltas:
                if strategy.exhausted and not delta.tool_calls:
                    continue
                if new_part := overlap.feed(delta):
                    new.append(new_part)
                if overlap.differs:
                    break
            if new:
                yield new
            if overlap.differs:
                return
        overlap.end()

    def answer(self) -> ChatAnswer:
        """Return how the stream ended. Its usage is that of the whole answer."""
        if self._current is None:
            return ChatAnswer("length", Usage(completion_tokens=self.tokens))
        strategy, stream = self._current
        answer = stream.answer()
        if strategy.tokens_left is None:
            return answer
        answer = replace(answer, usage=self._usage(answer.usage, strategy.tokens_left, strategy.overlap))
        if strategy.overlap.stopped:
            return replace(answer, finish_reason="stop")
        if answer.finish_reason == "stop" and strategy.exhausted:
            return replace(answer, finish_reason="length")
        return answer

    def _usage(self, reported: Usage, tokens_left: int, overlap: OverlapFilter) -> Usage:
        """Count tokens for the whole answer. The server counted delivered tokens as part of its prompt, and those that
        it repeated in both counts."""
        before = self._resume.tokens
        new = overlap.new if reported.completion_tokens is None else reported.completion_tokens - overlap.repeated
        completion = before + min(new, tokens_left)
        if reported.prompt_tokens is None:
            return Usage(completion_tokens=completion)
        prompt = max(0, reported.prompt_tokens - before + overlap.repeated)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            cached_tokens=None if reported.cached_tokens is None else min(reported.cached_tokens, prompt),
        )
