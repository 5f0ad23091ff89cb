"""The tool calls of an answer as clients need them: numbered from 0, each with an id and a name from its beginning."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic_core import from_json


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of a tool call."""

    index: int
    """Number of the call in the answer, from 0."""
    begins: bool
    """True for the first piece of its call."""
    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class _Call:
    index: int
    id: str
    name: str = ""
    held: str = ""
    """Arguments that came before the name did."""
    begun: bool = False


def arguments_of(call: Fragment) -> dict[str, Any]:
    """Return the arguments of a whole call as an object: as far as they go, if `max_tokens` cut them."""
    try:
        arguments = from_json(call.arguments or "{}", allow_partial=True, allow_inf_nan=False)
    except ValueError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {"unreadable_arguments": call.arguments}


class ToolCalls:
    """Reads the fragments of one answer. Servers leave out ids, or number calls from 1."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def read(self, fragments: Iterable[dict[str, Any]]) -> list[Fragment]:
        """Return the pieces to send now. Nothing of a call is sent before its name is known."""
        pieces = []
        for fragment in fragments:
            call = self._call(fragment)
            function = fragment.get("function") or {}
            call.name += "" if call.begun else function.get("name") or ""
            arguments = call.held + (function.get("arguments") or "")
            if not call.name:
                call.held = arguments
                continue
            pieces.append(Fragment(call.index, not call.begun, call.id, call.name, arguments))
            call.begun, call.held = True, ""
        return pieces

    def whole(self, calls: Iterable[dict[str, Any]]) -> list[Fragment]:
        """Return the calls of an answer that is complete, each as one piece."""
        return self.read({**call, "index": index} for index, call in enumerate(calls))

    @cached_property
    def _ids(self) -> str:
        """What the ids have in common, made when a call comes: most answers have none. It has nothing of the request's
        id: clients may use one for a conversation."""
        return f"call_{uuid.uuid4().hex[:20]}"

    def _call(self, fragment: dict[str, Any]) -> _Call:
        key = fragment.get("index", len(self._calls))
        if key not in self._calls:
            index, given = len(self._calls), str(fragment.get("id") or "")
            taken = any(call.id == given for call in self._calls.values())  # some servers give all calls one id
            self._calls[key] = _Call(index, f"{self._ids}{index}" if taken or not given else given)
        return self._calls[key]
