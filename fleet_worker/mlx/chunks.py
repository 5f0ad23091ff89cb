"""The body of a chat stream: bytes -> server-sent events -> JSON chunks, in all their variants -> deltas."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json

from fleet_worker.errors import MalformedOutput
from fleet_worker.mlx.error_mapping import error_of_event
from fleet_worker.mlx.reasoning import ReasoningSplitter
from fleet_worker.protocol.reply import Delta, Usage

MAX_EVENT_BYTES = 8 * 1024 * 1024


class EventParser:
    """Splits a `text/event-stream` into its events, as it arrives.

    Lines end with \\n, \\r\\n or \\r and nothing else: U+2028 and similar, at which `str.splitlines` and httpx's
    `iter_lines` split too, are ordinary text inside JSON. The parser works on bytes, and line ends are ASCII, so half a
    character is never decoded.
    """

    def __init__(self) -> None:
        self._incomplete_line = b""
        self._data: list[bytes] = []
        self._data_size = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of each event that is now complete.

        Raises:
            MalformedOutput: an event is larger than 8 MiB.
        """
        buffered = self._incomplete_line + received if self._incomplete_line else received
        # A final \r may be the first half of \r\n: it waits for the next bytes.
        end = 1 + max(buffered.rfind(b"\n"), buffered.rfind(b"\r", 0, len(buffered) - 1))
        self._incomplete_line = buffered[end:]
        events = self._events(buffered[:end])
        if len(self._incomplete_line) + self._data_size > MAX_EVENT_BYTES:
            raise MalformedOutput("the MLX server sent an event that is too large")
        return events

    def end(self) -> list[bytes]:
        """Return the last event, if the server closed without the blank line that ends it."""
        rest, self._incomplete_line = self._incomplete_line, b""
        return self._events(rest + b"\n\n")

    def _events(self, lines: bytes) -> list[bytes]:
        events = []
        for line in lines.splitlines():  # bytes.splitlines splits at \n, \r\n and \r only
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._data_size += len(line)
            elif not line and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
                self._data_size = 0
        return events


class ChunkReader:
    """Turns the events of one stream into deltas, and records how the stream ended."""

    def __init__(self, splitter: ReasoningSplitter | None = None) -> None:
        self.finish_reason: str | None = None
        """As the server wrote it; None until then."""
        self.usage = Usage()
        self.done = False
        """[DONE] was received; later events are ignored."""
        self.tokens = 0
        """Number of chunks whose text, reasoning or tool calls have been returned: servers send a token in each."""
        self._held_back = 0
        """Chunks whose text the splitter still holds back."""
        self._splitter = splitter
        self._tool_calls = _ToolCallIndexes()

    def read(self, events: list[bytes]) -> list[Delta]:
        """Return the deltas of these events.

        Raises:
            FleetError: an event is an error, or is not a chat completion chunk.
        """
        deltas: list[Delta] = []
        for event in () if self.done else events:
            if event == b"[DONE]":
                self.done = True
                break
            if delta := self._read_chunk(event):
                deltas.append(delta)
        return deltas

    def end(self) -> list[Delta]:
        """Return the text that was held back because it could have become a tag."""
        delta = self._counted(Delta.of(*self._splitter.end(), None)) if self._splitter else None
        return [delta] if delta else []

    def _read_chunk(self, event: bytes) -> Delta | None:
        try:
            chunk = from_json(event)
            if chunk.get("error") is not None:
                raise error_of_event(chunk["error"])
            if usage := chunk.get("usage"):
                self.usage = parse_usage(usage)
            if not (choices := chunk.get("choices")):
                return None
            choice = choices[0]
            if finish_reason := choice.get("finish_reason"):
                self.finish_reason = self.finish_reason or str(finish_reason)  # mlx-omni-server repeats it
            delta = choice.get("delta")
            return self._normalised(delta) if delta else None
        except (TypeError, KeyError, IndexError, AttributeError, ValueError):
            raise MalformedOutput("the MLX server sent a chunk that is not a chat completion chunk") from None

    def _normalised(self, delta: dict[str, Any]) -> Delta | None:
        """Drop the role and empty fields, give `reasoning` one name, and number the tool calls."""
        content = delta.get("content")
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        if content and self._splitter:
            content, in_tags = self._splitter.feed(content)
            if in_tags:
                reasoning = (reasoning or "") + in_tags
        calls = delta.get("tool_calls")
        self._held_back += bool(delta.get("content") or reasoning or calls)
        return self._counted(Delta.of(content, reasoning, calls and [self._tool_calls.indexed(call) for call in calls]))

    def _counted(self, delta: Delta | None) -> Delta | None:
        """Count the chunks that this delta completes: all since the last one that was returned."""
        if delta:
            self.tokens += self._held_back
            self._held_back = 0
        return delta


class _ToolCallIndexes:
    """Adds the `index` of its tool call to each fragment, for servers that leave it out."""

    def __init__(self) -> None:
        self._current = -1
        self._id: Any = None

    def indexed(self, fragment: dict[str, Any]) -> dict[str, Any]:
        """Return the fragment with its index, and with its arguments as a string of JSON."""
        function = dict(fragment.get("function") or {})
        if not isinstance(function.get("name", ""), str | None):
            raise TypeError("a name is a string")
        if isinstance(arguments := function.get("arguments"), dict):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not isinstance(arguments, str | None):
            raise TypeError("arguments are a string of JSON")
        index = fragment.get("index")
        if type(index) is not int:
            index = self._current + self._is_new(fragment.get("id"), function)
        self._current, self._id = max(index, 0), fragment.get("id") or self._id
        return {**fragment, "index": self._current, "function": function}

    def _is_new(self, call_id: Any, function: dict[str, Any]) -> bool:
        """A call begins with a new id or, where ids are left out, with a name."""
        return call_id != self._id if call_id else bool(function.get("name"))


def parse_usage(usage: Any) -> Usage:
    """Return the counts in a `usage` object. Servers leave it out, send null, or nest details in it."""
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    counts = {**(details if isinstance(details, dict) else {}), **usage}
    return Usage(**{name: counts[name] for name in Usage.model_fields if type(counts.get(name)) is int})
