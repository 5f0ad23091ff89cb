"""Goes on with an answer of which another server has delivered the beginning."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from fleet_worker.errors import InvalidRequest, StreamInterrupted
from fleet_worker.mlx.chat_stream import ChatAnswer, ServerStream
from fleet_worker.mlx.offering import Offering
from fleet_worker.mlx.overlap import OverlapFilter, before_last_word
from fleet_worker.mlx.profiles import ServerProfile, chat_body, continued_body
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.reply import Delta, Usage
from fleet_worker.protocol.request import Resume

_SHORT = 200
"""Characters of an answer that is rather generated a second time than joined by a guess."""


@dataclass(frozen=True, slots=True)
class ResumeStrategy:
    """What to ask a server, and how that joins what was delivered."""

    body: dict[str, Any]
    seam: OverlapFilter
    left: int | None
    """How many tokens may still come; None if the server begins at the beginning, and counts itself."""

    @property
    def replays(self) -> bool:
        return self.left is None

    @property
    def used_up(self) -> bool:
        return self.left is not None and self.seam.new >= self.left


@dataclass(frozen=True, slots=True)
class _Question:
    """What was asked, of which server, and what of the answer was delivered."""

    body: dict[str, Any]
    offering: Offering
    quirks: ServerProfile
    resume: Resume

    @property
    def exact(self) -> bool:
        return bool(self.body["temperature"] == 0)

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return int(self.body["max_tokens"]) - (self.quirks.hides_length or 0) - self.resume.tokens

    @property
    def stop(self) -> Sequence[str]:
        return list(self.body.get("stop", ()))

    def continued(self, cut: int, *, exact: bool) -> dict[str, Any] | None:
        """The body by which the server goes on at this character of what was delivered; None if none does."""
        partial, again = self.resume.content[:cut], self.resume.content[cut:]
        # A token is at least a byte, so this is enough for what is said again.
        limit = self.left + (self.quirks.hides_length or 0) + len(again.encode())
        return continued_body({**self.body, "max_tokens": limit}, partial, self.offering, self.quirks, exact=exact)


def ways(params: ChatParams, offering: Offering, quirks: ServerProfile, resume: Resume) -> list[ResumeStrategy]:
    """Return what to try, in this order, to go on with an answer; nothing if its tokens are used up.

    The server goes on where the last word begins that was delivered, or where the text ends; or it begins at the
    beginning, and what equals the delivered text is swallowed. That needs temperature 0, and then it is the only way
    for an answer with reasoning, which no server can be given back.

    Raises:
        StreamInterrupted: there is no way; retryable if another server may have one.
    """
    question = _Question(chat_body(params, offering, quirks), offering, quirks, resume)
    if question.left <= 0:
        return []
    if (params.response_format or {}).get("type", "text") != "text":
        raise StreamInterrupted("an answer in JSON is not continued")
    found: list[ResumeStrategy] = []
    if resume.content and not (question.exact and resume.reasoning):
        found += _joining(question)
    if question.exact:
        seam = OverlapFilter("", again=resume.content, reasoning=resume.reasoning, stop=question.stop)
        found.append(ResumeStrategy(question.body, seam, None))
    if not found:
        # Reasoning alone is nothing to go on with for any server.
        raise StreamInterrupted("this MLX server cannot go on with what was delivered", retryable=bool(resume.content))
    return found


def _joining(question: _Question) -> Iterator[ResumeStrategy]:
    delivered = question.resume.content
    # transformers takes white space from the end of a text that is continued, if the model's chat template does.
    end = len(delivered if question.quirks.continues == "template" else delivered.rstrip())
    word = min(before_last_word(delivered), end)
    for cut in sorted({word, end}):
        guesses = cut == end
        if cut == 0 or (word == end <= _SHORT and question.exact):
            continue
        if asked := question.continued(cut, exact=question.exact and not guesses):
            seam = OverlapFilter(delivered, again=delivered[cut:], stop=question.stop, guesses=guesses)
            yield ResumeStrategy(asked, seam, question.left)


class Continuation:
    """An answer that goes on; used as a `ServerStream` is. Leave it by `close`."""

    def __init__(
        self,
        found: list[ResumeStrategy],
        resume: Resume,
        ask: Callable[[ResumeStrategy], AbstractContextManager[ServerStream]],
    ) -> None:
        self._ways = found
        self._resume = resume
        self._ask = ask
        self._asked: tuple[ResumeStrategy, ServerStream] | None = None
        self._deltas = self._run()

    def __iter__(self) -> Iterator[list[Delta]]:
        """Raises what a `ServerStream` raises, and a retryable `StreamInterrupted` if none joins what was delivered."""
        return self._deltas

    def close(self) -> None:
        self._deltas.close()

    @property
    def tokens(self) -> int:
        """As of a `ServerStream`, those of what was delivered included."""
        match self._asked:
            case (ResumeStrategy(left=None), stream):
                return stream.tokens
            case (way, _):
                return self._resume.tokens + way.seam.new
        return self._resume.tokens

    def _run(self) -> Generator[list[Delta], None, None]:
        for way in self._ways:
            try:
                with self._ask(way) as stream:
                    self._asked = way, stream
                    yield from self._joined(way, stream)
            except InvalidRequest:  # not of the caller's making: the same request was taken elsewhere
                if way.seam.new:
                    raise
                continue
            if not way.seam.differs:
                return
        if self._ways:
            raise StreamInterrupted("what the MLX server says does not join what was delivered", retryable=True)

    def _joined(self, way: ResumeStrategy, stream: ServerStream) -> Iterator[list[Delta]]:
        seam = way.seam
        for deltas in stream:
            new: list[Delta] = []
            for delta in deltas:
                if way.used_up and not delta.tool_calls:
                    continue
                if piece := seam.feed(delta):
                    new.append(piece)
                if seam.differs or seam.stopped:
                    break
            if new:
                yield new
            if seam.differs or seam.stopped:
                return
        if last := seam.end():
            yield [last]

    def answer(self) -> ChatAnswer:
        """As of a `ServerStream`, and about the whole answer: its usage counts what was delivered before."""
        if self._asked is None:
            usage = Usage(completion_tokens=self.tokens)
            return ChatAnswer(None, None, [], "length", usage, ttft=None, tokens_per_second=None)
        way, stream = self._asked
        answer = stream.answer()
        if way.left is None:
            return answer
        finish = answer.finish_reason
        if way.seam.stopped:
            finish = "stop"
        elif finish == "stop" and way.used_up:
            finish = "length"
        return replace(answer, finish_reason=finish, usage=self._usage(answer.usage, way.left, way.seam))

    def _usage(self, said: Usage, left: int, seam: OverlapFilter) -> Usage:
        """The delivered tokens are of the prompt for this server; what it said again is in both counts."""
        before = self._resume.tokens
        new = seam.new if said.completion_tokens is None else said.completion_tokens - seam.repeated
        completion = before + min(new, left)
        if said.prompt_tokens is None:
            return Usage(completion_tokens=completion)
        prompt = max(0, said.prompt_tokens - before + seam.repeated)
        cached = None if said.cached_tokens is None else min(said.cached_tokens, prompt)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            cached_tokens=cached,
        )
