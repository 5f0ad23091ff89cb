"""The events of a chat stream: JSON chunks, in all their variants -> deltas."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from fleet_worker.errors import FleetError, MalformedOutput
from fleet_worker.mlx.error_mapping import error_in, error_of_event
from fleet_worker.mlx.events import HEARTBEATS
from fleet_worker.mlx.half_characters import CharacterJoiner, parse_odd_json
from fleet_worker.mlx.reasoning import ReasoningSplitter
from fleet_worker.mlx.tool_calls import ToolCalls
from fleet_worker.protocol.reply import Delta, Usage

_NO_CHUNK = "the MLX server sent a chunk that is not a chat completion chunk"
_MOST_TOKENS = 2**31
_DONE = (b"[DONE]", b'"[DONE]"')
_NO_CHOICE = object()
_ANSWERS = ("content", "reasoning", "reasoning_content", "thinking", "reasoning_details", "tool_calls")
"""Fields of a message that are part of the answer."""
_AFTER_FINISH = 100
"""Chunks that may follow the one with the finish_reason: a server that sends more does not stop by itself."""


class ChunkReader:
    """Turns the events of one stream into deltas, and records how the stream ended."""

    def __init__(self, splitter: ReasoningSplitter | None = None) -> None:
        self.finish_reason: str | None = None
        """As the server wrote it; None until then. Text that follows it is not part of the answer."""
        self.usage = Usage()
        self.done = False
        """[DONE] was received; later events are ignored."""
        self.overruns = False
        """The server goes on and on after its finish_reason."""
        self.failure: FleetError | None = None
        """What is to be raised after the deltas that were returned last."""
        self.moved = False
        """Something of the answer was in the last events, if only a finish_reason: not only heartbeats."""
        self.tokens = 0
        """Number of chunks whose text, reasoning or tool calls have been returned: servers send a token in each."""
        self.characters = 0
        """Number of characters of text and reasoning."""
        self._held_back = 0
        """Chunks whose text the splitter still holds back."""
        self._after_finish = 0
        self._choice: Any = None
        """The `index` of the choice that is read: of none after its finish_reason."""
        self._by_message = False
        """The server sends whole messages, or text, in the place of deltas."""
        self._splitter = splitter
        self._characters = CharacterJoiner()
        self._tool_calls = ToolCalls()

    @property
    def has_tokens(self) -> bool:
        return self.tokens + self._held_back > 0

    @property
    def has_nameless_call(self) -> bool:
        return self._tool_calls.any_nameless

    def read(self, events: list[bytes]) -> list[Delta]:
        """Return the deltas of these events, up to one that is refused: `failure` has its error then.

        Raises:
            FleetError: an event before all deltas is an error, or is not a chat completion chunk.
        """
        deltas: list[Delta] = []
        self.moved = False
        for event in () if self.done else events:
            if event in _DONE:
                self.done = True
                break
            try:
                delta = self._read_chunk(event)
            except FleetError as error:
                if not deltas:
                    raise
                self.failure = error
                break
            if delta:
                deltas.append(delta)
            elif self.done:
                break
        return deltas

    def read_whole(self, body: bytes) -> list[Delta]:
        """Return the delta of an answer that came in one piece instead of a stream.

        Raises:
            FleetError: it is an error, or no chat completion.
        """
        if body.startswith(b"<"):
            text = "the MLX server answered with a web page instead of a completion: check base_url of this instance"
            raise MalformedOutput(text, retryable=True)
        try:
            parse_odd_json(body)
        except (ValueError, RecursionError):  # half of it: the connection broke in the middle
            return []
        delta = self._read_chunk(body)
        if not self.moved:
            raise MalformedOutput(_NO_CHUNK)
        self.finish_reason = self.finish_reason or "stop"
        self.done = True
        return [delta] if delta else []

    def end(self) -> list[Delta]:
        """Return the text that was held back because it could have become a tag, or a character."""
        halves = self._characters.end()
        content = halves.get("content") or halves.get("text")
        reasoning = halves.get("reasoning") or halves.get("reasoning_content")
        if self._splitter:
            visible, in_tags = self._splitter.feed(content or "")
            last_visible, last_in_tags = self._splitter.end()
            content, reasoning = visible + last_visible, (reasoning or "") + in_tags + last_in_tags
        delta = self._counted(Delta.of(content, reasoning, None))
        return [delta] if delta else []

    def _read_chunk(self, event: bytes) -> Delta | None:
        try:
            try:
                chunk = from_json(event)
            except ValueError:
                chunk = self._odd_chunk(event)
            else:
                if self._characters.waiting:
                    chunk = self._characters.joined(chunk)
            if chunk.get("error") is not None and (error := error_in(chunk)):
                raise error
            if usage := chunk.get("usage"):
                self.usage = parse_usage(usage)
            if not (choices := chunk.get("choices")):
                self._read_other(chunk)
                return None
            choice = choices[0]
            if (len(choices) > 1 or choice.get("index") != self._choice) and not (choice := self._followed(choices)):
                return None
            self.moved = True
            delta = choice.get("delta") or self._without_delta(choice)
            read = self._normalised(delta) if delta else None
            if read is None or choice.get("finish_reason"):
                self._finish(choice, delta or {})
            return read
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, RecursionError):
            raise MalformedOutput(_NO_CHUNK) from None

    def _odd_chunk(self, event: bytes) -> Any:
        """Return the chunk of an event that is not valid JSON; an empty one for a heartbeat, and for another
        spelling of [DONE]."""
        word = event.strip().lower()
        self.done = word == b"[done]"
        return {} if self.done or not word or word in HEARTBEATS else self._characters.joined(parse_odd_json(event))

    def _read_other(self, chunk: dict[str, Any]) -> None:
        """Read a chunk without choices: usage, a heartbeat, or an error."""
        if error := error_in(chunk):
            raise error

    def _followed(self, choices: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the choice that is read, of several or of another number than before: we ask for one."""
        if self.finish_reason is not None:
            self._after_finish += 1
            self.overruns = self._after_finish > _AFTER_FINISH
            return None
        if self._choice is None:
            indexes = [choice.get("index") for choice in choices]
            self._choice = 0 if 0 in indexes else indexes[0]
        return next((choice for choice in choices if choice.get("index") in (self._choice, None)), None)

    def _finish(self, choice: dict[str, Any], delta: dict[str, Any]) -> None:
        """Read how the choice ended, if it did: with an error, whatever its finish_reason is, or with that."""
        if error := choice.get("error") or delta.get("error"):
            raise error_of_event(error)
        reason = str(choice.get("finish_reason") or "null").lower()
        if reason not in ("null", "none"):
            self.finish_reason, self._choice = reason, _NO_CHOICE

    def _without_delta(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        """Return what some servers send in the place of deltas. After deltas it would be the whole text once more."""
        message = choice.get("message") or {"content": choice.get("text")}
        if self.has_tokens and not self._by_message:
            return None
        self._by_message = self._by_message or any(message.get(name) for name in _ANSWERS)
        return message

    def _normalised(self, delta: dict[str, Any]) -> Delta | None:
        """Drop the role and empty fields, give `reasoning` one name, and number the tool calls."""
        content = delta.get("content")
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        if not reasoning and (not content or len(delta) > 1):  # of most tokens the content is all there is
            reasoning = _other_reasoning(delta)
        calls = delta.get("tool_calls")
        if content.__class__ is not str:
            content, reasoning, calls = _unusual(delta, content, reasoning, calls)
        self._held_back += bool(content or reasoning or calls)
        if content and self._splitter:
            content, in_tags = self._splitter.feed(content)
            if in_tags:
                reasoning = (reasoning or "") + in_tags
        if reasoning or calls:
            self.characters += len(content or "") + len(reasoning or "")
            return self._counted(Delta.of(content, reasoning, calls and self._tool_calls.numbered(calls)))
        if not content:
            return None
        self.characters += len(content)
        return self._counted(Delta(content=content))

    def _counted(self, delta: Delta | None) -> Delta | None:
        """Count the chunks that this delta completes: all since the last one that was returned."""
        if delta:
            self.tokens += self._held_back
            self._held_back = 0
        return delta


def _other_reasoning(delta: dict[str, Any]) -> str | None:
    """Return reasoning as Ollama (`thinking`) and OpenRouter (`reasoning_details`) name it."""
    if isinstance(thinking := delta.get("thinking"), str) and thinking:
        return thinking
    details = delta.get("reasoning_details")
    texts = [detail.get("text") or detail.get("summary") for detail in details] if details else []
    return "".join(text for text in texts if text) or None


def _unusual(delta: dict[str, Any], content: Any, reasoning: Any, calls: Any) -> tuple[Any, Any, Any]:
    """Return content, reasoning and tool calls of a delta whose content is no text: null, or a list of parts."""
    if content is None:
        legacy = delta.get("function_call")
        return delta.get("refusal"), reasoning, calls or (legacy and [{"type": "function", "function": legacy}])
    if not isinstance(content, list):
        return content, reasoning, calls
    text, thoughts = _texts_of(content)
    return text, (reasoning or "") + thoughts, calls


def _texts_of(parts: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the text and the reasoning in a list of parts; mistral's reasoning is a list of parts itself."""
    text = thoughts = ""
    for part in parts:
        if part["type"] in ("text", "output_text"):
            text += part["text"]
        elif part["type"] in ("reasoning", "thinking"):
            inner = part.get("text") or part["thinking"]
            thoughts += inner if isinstance(inner, str) else _texts_of(inner)[0]
        else:
            raise TypeError("only texts are expected")
    return text, thoughts


def parse_usage(usage: Any) -> Usage:
    """Return the counts in a `usage` object. Servers leave it out, send null, or nest details in it."""
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    counts = {**(details if isinstance(details, dict) else {}), **usage}
    return Usage(**{name: counts[name] for name in Usage.model_fields if _is_count(counts.get(name))})


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_TOKENS
