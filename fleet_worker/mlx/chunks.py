"""The JSON chunks of a chat stream, as every kind of server writes them -> deltas in one vocabulary."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json

from fleet_worker.errors import MalformedOutput
from fleet_worker.mlx.error_mapping import error_event
from fleet_worker.mlx.reasoning import ReasoningSplitter
from fleet_worker.protocol.reply import Delta, Usage


class ChunkReader:
    """Reads the events of one stream, and knows at the end how it ended."""

    def __init__(self, splitter: ReasoningSplitter | None = None) -> None:
        self.finish: str | None = None
        self.usage = Usage()
        self.done = False
        """[DONE] was said; what comes after it is not read."""
        self.pieces = 0
        """Chunks that carried something of what was read: a token each, as servers send them, or a few."""
        self._pending = 0
        self._splitter = splitter
        self._calls = _CallNumbers()

    def read(self, events: list[bytes]) -> list[Delta]:
        """Return what these events say.

        Raises:
            FleetError: an event is an error, or no chat completion chunk.
        """
        deltas: list[Delta] = []
        for event in () if self.done else events:
            if event == b"[DONE]":
                self.done = True
                break
            if delta := self._chunk(event):
                deltas.append(delta)
        return deltas

    def end(self) -> list[Delta]:
        """Return what was held back while it might have become a tag."""
        delta = self._counted(_delta(*self._splitter.end(), None)) if self._splitter else None
        return [delta] if delta else []

    def _chunk(self, event: bytes) -> Delta | None:
        try:
            chunk = from_json(event)
            if chunk.get("error") is not None:
                raise error_event(chunk["error"])
            if usage := chunk.get("usage"):
                self.usage = usage_of(usage)
            if not (choices := chunk.get("choices")):
                return None
            choice = choices[0]
            if finish := choice.get("finish_reason"):
                self.finish = self.finish or str(finish)  # mlx-omni-server repeats it
            delta = choice.get("delta")
            return self._normalised(delta) if delta else None
        except (TypeError, KeyError, IndexError, AttributeError, ValueError):
            raise MalformedOutput("the MLX server sent a chunk that is not a chat completion chunk") from None

    def _normalised(self, delta: dict[str, Any]) -> Delta | None:
        """No role, no empty pieces, `reasoning` under one name, numbered tool calls."""
        content = delta.get("content")
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        if content and self._splitter:
            content, thought = self._splitter.feed(content)
            if thought:
                reasoning = (reasoning or "") + thought
        calls = delta.get("tool_calls")
        self._pending += bool(delta.get("content") or reasoning or calls)
        return self._counted(_delta(content, reasoning, calls and [self._calls.numbered(call) for call in calls]))

    def _counted(self, delta: Delta | None) -> Delta | None:
        """A chunk whose text is held back counts when the text is let go."""
        if delta:
            self.pieces += self._pending
            self._pending = 0
        return delta


def _delta(content: str | None, reasoning: str | None, calls: list[dict[str, Any]] | None) -> Delta | None:
    if reasoning or calls:
        return Delta(content=content or None, reasoning=reasoning or None, tool_calls=calls or None)
    return Delta(content=content) if content else None


class _CallNumbers:
    """Gives the pieces of tool calls the number of their call where a server leaves it out."""

    def __init__(self) -> None:
        self._current = -1
        self._id: Any = None

    def numbered(self, piece: dict[str, Any]) -> dict[str, Any]:
        function = dict(piece.get("function") or {})
        if not isinstance(function.get("name", ""), str | None):
            raise TypeError("a name is a string")
        if isinstance(arguments := function.get("arguments"), dict):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not isinstance(arguments, str | None):
            raise TypeError("arguments are a string of JSON")
        index = piece.get("index")
        if type(index) is not int:
            index = self._current + self._begins(piece.get("id"), function)
        self._current, self._id = max(index, 0), piece.get("id") or self._id
        return {**piece, "index": self._current, "function": function}

    def _begins(self, call_id: Any, function: dict[str, Any]) -> bool:
        """A new id, or without one a name, begins a call; the rest are fragments of the last one."""
        return call_id != self._id if call_id else bool(function.get("name"))


def usage_of(said: Any) -> Usage:
    """Only what is a count: servers leave usage out, send null, or nest details in it."""
    said = said if isinstance(said, dict) else {}
    details = said.get("prompt_tokens_details")
    counts = {**(details if isinstance(details, dict) else {}), **said}
    return Usage(**{name: counts[name] for name in Usage.model_fields if type(counts.get(name)) is int})
