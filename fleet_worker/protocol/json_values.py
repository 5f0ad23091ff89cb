"""What JSON in UTF-8 can hold: finite numbers, whole characters, keys that are strings; and how deep it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, Final

from pydantic import BaseModel

from fleet_worker.errors import InvalidRequest

MOST_LEVELS: Final = 100
"""How deep the JSON of a request may be nested."""
MOST_VALUES: Final = 50_000
"""How many values a request may have. To check each takes half a microsecond, and up to 250 bytes of memory."""


LONGEST_NUMBER = 1024
"""Bits, of which no decimal number has so many."""

Names = Callable[[], Collection[str]]


def check(value: Any, field_names: Names, path: str = "", levels: int = MOST_LEVELS) -> None:
    """Raise `InvalidRequest` for what JSON cannot hold. Its `param` is the path of that, as far as `field_names` go:
    other keys are data."""
    if not _is_json(value, levels):
        _find(value, field_names, path, levels)


def _is_json(value: Any, levels: int) -> bool:
    """Tell whether a value is surely JSON: several times as fast as finding out where it is not."""
    kind = type(value)
    if kind is str:
        return value.isascii() or _is_whole(value)
    if kind is dict:
        return levels > 0 and all(
            type(key) is str and _is_json(key, 0) and _is_json(part, levels - 1) for key, part in value.items()
        )
    if kind is list:
        return levels > 0 and all(_is_json(part, levels - 1) for part in value)
    return value is None or kind is int or kind is bool or (kind is float and math.isfinite(value))


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find(value: Any, field_names: Names, path: str, levels: int) -> None:
    """Raise `InvalidRequest` for the first part that JSON cannot hold, if there is one."""
    if isinstance(value, dict | list | tuple) and levels == 0:
        raise _refusal(path, f"is nested more than {MOST_LEVELS} levels deep")
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise _refusal(path, f"has a key that is {kind_of(key)}: the keys of an object are strings")
            _check_scalar(key, path)
            _find(part, field_names, _below(path, key, field_names), levels - 1)
    elif isinstance(value, list | tuple):
        for at, part in enumerate(value):
            _find(part, field_names, path if path.endswith(".") else f"{path}.{at}", levels - 1)
    else:
        _check_scalar(value, path)


def has_more_values(text: bytes, most: int) -> bool:
    """Tell whether JSON has more than about `most` values, without reading it."""
    return _brackets_and_commas(text) >= most and _values(text, most) >= most


def _brackets_and_commas(text: bytes) -> int:
    """Return a number that is no less than that of all values. It takes 0.1 ms for a megabyte."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _values(text: bytes, most: int) -> int:
    """Count again without what is inside of strings, which may be a text of megabytes with any number of commas."""
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * most:  # a key and a text for each value
        return most
    return _brackets_and_commas(b"".join(plain.split(b'"')[::2]))


def _check_scalar(value: Any, path: str) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            text = (
                f"has half a character at position {error.start} (a lone UTF-16 surrogate, as of a text that was cut "
                "inside an emoji): cut between whole characters, or put U+FFFD in its place"
            )
            raise _refusal(path, text) from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _refusal(path, "is a number that is not finite: JSON has no NaN and no infinity")
    elif value is not None and not isinstance(value, bool | int | BaseModel):
        raise _refusal(path, f"is {kind_of(value)}: only numbers, strings, booleans, null, lists and objects are JSON")


def _below(path: str, key: str, field_names: Names) -> str:
    """Return the path of a part of an object. A dot ends the path where data begins."""
    if path.endswith("."):
        return path
    if key not in field_names():
        return f"{path}."
    return key if path in ("", "params") else f"{path}.{key}"


def kind_of(value: Any) -> str:
    """Return the kind of a value, in the words of JSON."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, float):
        return "a decimal number" if math.isfinite(value) else "a number that is not finite"
    if isinstance(value, int):
        return "a number" if value.bit_length() < LONGEST_NUMBER else "a number that is too large"
    kinds = {str: "a string", list: "a list", tuple: "a Python tuple", dict: "an object", type(None): "null"}
    return kinds.get(type(value), f"a Python {type(value).__name__[:40]}")


def _refusal(path: str, reason: str) -> InvalidRequest:
    place = path.strip(".")
    where: dict[str, Any] = {"param": place} if place else {}
    return InvalidRequest(f"{place or 'request'}: {reason}", **where)
