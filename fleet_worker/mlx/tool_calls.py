"""Which tool call a fragment belongs to: servers number, name and identify their calls in many ways."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fleet_worker.errors import MalformedOutput

_MOST_CALLS = 1000
"""In one answer. A model writes a few."""
_TOO_MANY = f"the MLX server sent more than {_MOST_CALLS} tool calls in one answer"
_FLAT = ("name", "arguments")
"""What some servers send beside the id, without a `function` around it."""
_MOST_CHARACTERS = 4_000_000
"""Of the names and arguments of all calls."""
_LONGEST_NAME = 1000
_LONGEST_NUMBER = 10
_MOST_ATTEMPTS = 100


@dataclass(slots=True, eq=False)
class _Call:
    index: int
    id: str | None
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    _attempts: int = 0

    def is_complete(self) -> bool:
        """Its arguments are a whole JSON value, as far as a few attempts can tell."""
        self._attempts += 1
        if self._attempts > _MOST_ATTEMPTS:
            return False
        try:
            json.loads("".join(self.arguments))
        except (ValueError, RecursionError):
            return False
        return True


class ToolCalls:
    """Numbers the tool calls of one answer from 0, and says for each fragment which of them it continues.

    A new id begins a call, whatever its `index` is. Where ids are left out, a new `index` does, or else a name that
    does not repeat or go on with that of the last call.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._size = 0
        self._by_id: dict[str, _Call] = {}
        self._by_index: dict[int, _Call] = {}
        """The last call that the server gave this number."""

    @property
    def any_nameless(self) -> bool:
        """Whether a call has no name so far: nobody can carry it out."""
        return any(not call.name for call in self._calls)

    def numbered(self, fragments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the fragments of one delta: each with the `index` of its call, the id of that call, a name only where
        the call begins, and its arguments as a string of JSON.

        Raises:
            TypeError, AttributeError: they are no fragments of tool calls.
            MalformedOutput: there are too many calls, or they are too large.
        """
        begun = len(self._calls)
        return [self._numbered(fragment, begun) for fragment in fragments]

    def _numbered(self, fragment: dict[str, Any], begun: int) -> dict[str, Any]:
        flat = {key: fragment[key] for key in _FLAT if key in fragment}
        function = _checked(fragment.get("function") or flat)
        name, arguments = function.get("name") or "", function.get("arguments") or ""
        call = self._call_of(fragment, name, arguments, begun)
        if name and name == call.name:
            function["name"] = ""
        else:
            call.name += name
        if arguments:
            call.arguments.append(arguments)
        self._size += len(name) + len(arguments)
        if self._size > _MOST_CHARACTERS or len(call.name) > _LONGEST_NAME:
            raise MalformedOutput("the MLX server sent names or arguments of tool calls that are too large")
        others = {key: value for key, value in fragment.items() if key not in ("id", *_FLAT)}
        identity = {"id": call.id} if call.id else {}
        return {**identity, **others, "index": call.index, "function": function}

    def _call_of(self, fragment: dict[str, Any], name: str, arguments: str, begun: int) -> _Call:
        """Return the call that this fragment continues or begins. `begun` calls began before its delta."""
        call_id, index = fragment.get("id"), fragment.get("index")
        call_id = str(call_id) if isinstance(call_id, str | int) and call_id != "" else None
        index = _number(index)
        call = self._by_id.get(call_id) if call_id else None
        if call and index is not None and index not in self._by_index and name and name != call.name:
            call = None  # some servers give all calls one id
        if call is None:
            last = self._calls[-1] if self._calls else None
            call = last if index is None else self._by_index.get(index)
            if call is None or self._begins(call, call_id, index, name, arguments, begun):
                call = self._new(call_id)
        if call_id and not call.id:
            call.id = call_id
            self._by_id[call_id] = call
        self._by_index[call.index if index is None else index] = call
        if len(self._by_index) > _MOST_CALLS:
            raise MalformedOutput(_TOO_MANY)
        return call

    def _begins(
        self, last: _Call, call_id: str | None, index: int | None, name: str, arguments: str, begun: int
    ) -> bool:
        """Tell whether another call begins, and not `last` goes on."""
        if call_id and last.id:
            # Some servers make up an id for every fragment, but then the number is the same and the name is left out.
            return index is None or bool(name) or (bool(arguments) and last.is_complete())
        if not name:
            return False
        if index is None and (last.index >= begun or not last.arguments):
            return last.index >= begun or name != last.name
        if not last.arguments:
            return False
        return name != last.name or (bool(arguments) and last.is_complete())

    def _new(self, call_id: str | None) -> _Call:
        if len(self._calls) >= _MOST_CALLS:
            raise MalformedOutput(_TOO_MANY)
        call = _Call(len(self._calls), call_id)
        self._calls.append(call)
        if call_id:
            self._by_id[call_id] = call
        return call


def _number(index: Any) -> int | None:
    """Return a number that may be written as a string or as a decimal number."""
    if isinstance(index, str) and index.isdecimal() and len(index) < _LONGEST_NUMBER:
        return int(index)
    if isinstance(index, float) and index.is_integer():
        return int(index)
    return index if type(index) is int else None


def _checked(function: Any) -> dict[str, Any]:
    """Return a copy of the `function` of a fragment, with its arguments as a string of JSON."""
    copy: dict[str, Any] = dict(function or {})
    if not isinstance(copy.get("name", ""), str | None):
        raise TypeError("a name is a string")
    if isinstance(arguments := copy.get("arguments"), dict):
        copy["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not isinstance(arguments, str | None):
        raise TypeError("arguments are a string of JSON")
    return copy
