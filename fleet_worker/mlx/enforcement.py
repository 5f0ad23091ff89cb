"""What the node itself makes sure of in an answer: stop strings, JSON, a single tool call.

Servers get these wrong: mlx_lm.server cuts a stop string out and goes on, others check JSON only in answers that are
not streamed, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic_core import from_json

from fleet_worker.errors import InvalidOutput
from fleet_worker.mlx.chat_stream import ChatAnswer
from fleet_worker.mlx.json_schema import fits_schema
from fleet_worker.mlx.reasoning import ReasoningSplitter, split_reasoning
from fleet_worker.mlx.stop_strings import StopStrings
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.reply import Delta, Usage, join


class AnswerStream(Protocol):
    """The stream of an answer: iterate over it, then call its `answer`."""

    @property
    def tokens(self) -> int: ...
    def __iter__(self) -> Iterator[list[Delta]]: ...
    def answer(self) -> ChatAnswer: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What an answer has to be like; false if there is nothing to make sure of."""

    stop: tuple[str, ...]
    single_call: bool
    json_format: dict[str, Any] | None
    """The `response_format`, unless it is plain text."""

    @classmethod
    def of(cls, params: ChatParams) -> Rules:
        wanted = params.response_format or {}
        json_format = wanted if wanted.get("type", "text") != "text" else None
        return cls(tuple(params.stop or ()), params.parallel_tool_calls is False, json_format)

    def __bool__(self) -> bool:
        return bool(self.stop or self.single_call or self.json_format)

    def check(self, content: str | None, finish_reason: str) -> None:
        """Raise `InvalidOutput` if a complete answer is not the JSON that was asked for.

        One that `max_tokens` or a stop string cut need not be JSON.
        """
        if self.json_format is None or finish_reason != "stop":
            return
        try:
            value = from_json(content or "", allow_inf_nan=False)
        except ValueError:
            raise InvalidOutput("the model's answer is not JSON", param="response_format") from None
        if self.json_format.get("type") == "json_object" and not isinstance(value, dict):
            raise InvalidOutput("the model's answer is not a JSON object", param="response_format")
        named = self.json_format.get("json_schema")
        if isinstance(named, dict) and not fits_schema(value, named.get("schema")):
            raise InvalidOutput("the model's answer does not follow the schema", param="response_format")


class EnforcedStream:
    """A stream that follows the rules. It ends at a stop string; leaving it then ends the generation.

    `delivered` is the visible text that was delivered before.
    """

    def __init__(self, stream: AnswerStream, rules: Rules, *, delivered: str = "") -> None:
        self._stream = stream
        self._rules = rules
        self._stop = StopStrings(rules.stop, delivered=delivered)
        self._content: list[str] = []
        self._has_calls = False
        self._held_back = 0
        """Number of deltas whose text is held back, at least in parts."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the answer so far, without those whose text is held back: they may never be delivered."""
        return self._stream.tokens - self._held_back

    def __iter__(self) -> Iterator[list[Delta]]:
        """Raises what the stream raises, and `InvalidOutput` at the end of an answer that breaks a rule."""
        for deltas in self._stream:
            if new := [each for delta in deltas if (each := self._followed(delta))]:
                yield new
            if self._stop.found:
                return
        self._held_back = 0
        if last := Delta.of(self._kept(self._stop.end()), None, None):
            yield [last]
        if not self._has_calls:
            self._rules.check("".join(self._content), self._stream.answer().finish_reason)

    def _followed(self, delta: Delta) -> Delta | None:
        if self._stop.found:
            return None
        content = self._kept(self._stop.feed(delta.content or ""))
        self._held_back = self._held_back + 1 if self._stop.holds_back else 0
        calls = None if self._stop.found else delta.tool_calls
        if calls and self._rules.single_call:
            calls = [fragment for fragment in calls if not fragment.get("index")]
        self._has_calls = self._has_calls or bool(calls)
        return Delta.of(content, delta.reasoning, calls)

    def _kept(self, content: str) -> str:
        if self._rules.json_format:
            self._content.append(content)
        return content

    def answer(self) -> ChatAnswer:
        """Return how the stream ended, without its text."""
        answer = self._stream.answer()
        return _stopped(answer, self._stream.tokens, self._stop.found) if self._stop.found else answer


def read_whole(stream: AnswerStream, rules: Rules, *, starts_in_reasoning: bool) -> ChatAnswer:
    """Read a stream whose text still has its tags of reasoning, and return the whole answer. It follows the rules.

    Raises:
        InvalidOutput: the answer is not the JSON that was asked for.
    """
    splitter, stop = ReasoningSplitter(starts_inside=starts_in_reasoning), StopStrings(rules.stop)
    read: list[Delta] = []
    for deltas in stream:
        read += deltas
        if rules.stop:
            for delta in deltas:
                stop.feed(splitter.feed(delta.content or "")[0])
            if stop.found:
                break
    whole = join(read)
    if whole["content"] and not whole["reasoning"]:
        visible, reasoning = split_reasoning(whole["content"], starts_inside=starts_in_reasoning)
        whole |= {"content": visible or None, "reasoning": reasoning or None}
    if rules.single_call:
        del whole["tool_calls"][1:]
    visible_stop = StopStrings(rules.stop)
    whole["content"] = (visible_stop.feed(whole["content"] or "") + visible_stop.end()) or None
    answer = replace(stream.answer(), **whole)
    if visible_stop.found:
        return _stopped(answer, stream.tokens, visible_stop.found)
    if not answer.tool_calls:
        rules.check(answer.content, answer.finish_reason)
    return answer


def _stopped(answer: ChatAnswer, tokens: int, stop_string: str) -> ChatAnswer:
    """Return the answer as one that a stop string ended, perhaps before the server could report its usage."""
    usage = answer.usage if answer.usage.completion_tokens else Usage(completion_tokens=tokens)
    return replace(answer, finish_reason="stop", stop_string=stop_string, usage=usage)
