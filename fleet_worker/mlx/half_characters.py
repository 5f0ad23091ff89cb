"""Joins characters that a server cut in two, and replaces by U+FFFD what never becomes a character.

A tokenizer may cut a character between two tokens, and a server may then send half of a surrogate pair (`"\\ud83d"`) in
one chunk and the other half in the next, or the bytes of a UTF-8 character in two.
"""

from __future__ import annotations

import json
import re
from typing import Any

_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_BYTES = re.compile("[\udc80-\udcff]+")
"""Bytes that are no UTF-8, as Python's `surrogateescape` stands for them."""
_HALF = re.compile("[\ud800-\udfff]")
_BEGINNING = re.compile(
    "(?:[\ud800-\udbff]|[\udcc2-\udcdf]|[\udce0-\udcef][\udc80-\udcbf]?|[\udcf0-\udcf4][\udc80-\udcbf]{0,2})\\Z"
)
"""The first half of a pair, or the first bytes of a character, at the end of a text."""
_MOST_DIGITS = 30


def parse_odd_json(event: bytes) -> Any:
    """Return this JSON, though it has halves of characters, raw control characters or endless numbers.

    Raises:
        ValueError, RecursionError: it is no JSON even so.
    """
    text = event.decode("utf-8", "surrogateescape")
    return json.loads(text, strict=False, parse_int=lambda digits: int(digits[:_MOST_DIGITS]))


class CharacterJoiner:
    """Takes the objects of one stream, in their order. A half at the end of a text waits for the same text of the next
    object."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[str | int, ...], str] = {}
        """Halves by the place of their text: the path of keys to it."""

    def joined(self, value: Any, *path: str | int) -> Any:
        """Return the object without half characters."""
        if isinstance(value, str):
            return self._joined_text(value, path)
        if isinstance(value, dict):
            return {_without_halves(key): self.joined(each, *path, key) for key, each in value.items()}
        if isinstance(value, list):
            return [self.joined(each, *path, at) for at, each in enumerate(value)]
        return value

    def end(self) -> dict[str, str]:
        """Return what still waits, by the last key of its place."""
        waiting, self.waiting = self.waiting, {}
        return {str(path[-1]): _without_halves(half) for path, half in waiting.items()}

    def _joined_text(self, text: str, path: tuple[str | int, ...]) -> str:
        text = _PAIR.sub(_character, self.waiting.pop(path, "") + text)
        if beginning := _BEGINNING.search(text):
            self.waiting[path] = beginning[0]
            text = text[: beginning.start()]
        return _without_halves(text)


def _without_halves(text: str) -> str:
    return _HALF.sub("\N{REPLACEMENT CHARACTER}", _BYTES.sub(_decoded, text))


def _character(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def _decoded(escaped: re.Match[str]) -> str:
    return escaped[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
