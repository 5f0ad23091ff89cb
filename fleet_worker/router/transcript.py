"""What a stream has delivered so far, as its texts alone.

The garbage collector of Python visits each object that lives, again and again. A frame with one delta is ten of them,
and with 100,000 frames the collector stopped the whole router for up to a second. It does not visit texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from fleet_worker.protocol.reply import Delta, join

Kind = Literal["content", "reasoning", "tool_calls", "resumed"]


class Transcript:
    """The deltas of a stream, in their order; those of one kind that follow one another become one."""

    def __init__(self) -> None:
        self.characters = 0
        """Of the content. It is counted as it grows: ten long streams may fail at once, in the thread that reads the
        replies of all others."""
        self.has_tool_calls = False
        self._runs: list[tuple[Kind, list[Any]]] = []
        """Deltas of one kind that follow one another, with their parts."""

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, deltas: Iterable[Delta]) -> None:
        """Append deltas. One that says nothing leaves no trace."""
        for delta in deltas:
            if delta.resumed:
                self._run("resumed").append(True)
            if delta.reasoning:
                self._run("reasoning").append(delta.reasoning)
            if delta.content:
                self._run("content").append(delta.content)
                self.characters += len(delta.content)
            if delta.tool_calls:
                self._run("tool_calls").extend(delta.tool_calls)
                self.has_tool_calls = True

    def _run(self, kind: Kind) -> list[Any]:
        """Return the parts of the last run, which is a new one if that was of another kind."""
        if not self._runs or self._runs[-1][0] != kind:
            self._runs.append((kind, []))
        return self._runs[-1][1]

    def pack(self) -> None:
        """Join the texts: no more is to come."""
        for kind, parts in self._runs:
            if kind in ("content", "reasoning"):
                parts[:] = ["".join(parts)]

    def deltas(self) -> list[Delta]:
        """Return one delta for each run, new objects each time."""
        return [_merged(kind, parts) for kind, parts in self._runs]

    def whole(self) -> dict[str, Any]:
        """Return `content`, `reasoning` and `tool_calls` of the whole answer."""
        return join(self.deltas())


def _merged(kind: Kind, parts: list[Any]) -> Delta:
    match kind:
        case "content":
            return Delta(content="".join(parts))
        case "reasoning":
            return Delta(reasoning="".join(parts))
        case "tool_calls":
            return Delta(tool_calls=parts)
        case "resumed":
            return Delta(resumed=True)
