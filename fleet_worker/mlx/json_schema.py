"""Checks JSON against the part of JSON Schema that describes the shape of an answer.

Texts of callers are never used as regular expressions: one can keep a process busy for ever. What is not checked here
(`pattern`, `format`, `not` and the like) is left to the server, which generates by the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MOST_STEPS = 20_000
"""Comparisons, some 50 ms of them; what is larger is taken as valid."""
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: value.is_integer() if isinstance(value, float) else type(value) is int,
}


def fits_schema(value: Any, schema: Any) -> bool:
    """Return False if a part of this JSON value is not as the schema says. What is no schema says nothing."""
    try:
        return _Check(schema).fits(value, schema)
    except (_TooLarge, RecursionError):
        return True


class _TooLarge(Exception):
    pass


class _Check:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._steps = 0

    def fits(self, value: Any, schema: Any) -> bool:
        self._count(1)
        if not isinstance(schema, dict):
            return schema is not False
        return all(
            check(value, schema) for check in (self._reference, self._kind, self._object, self._array, self._combined)
        )

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise _TooLarge

    def _reference(self, value: Any, schema: dict[str, Any]) -> bool:
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            return True
        self._count(len(reference))
        target = self._root
        for key in reference.split("/")[1:]:
            target = target.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        return target is None or self.fits(value, target)

    def _kind(self, value: Any, schema: dict[str, Any]) -> bool:
        kind = schema.get("type")
        types = [_TYPES[each] for each in _list(kind, [kind]) if isinstance(each, str) and each in _TYPES]
        if types and not any(is_of_type(value) for is_of_type in types):
            return False
        if "const" in schema and value != schema["const"]:
            return False
        allowed = self._counted(schema.get("enum"))
        return not allowed or value in allowed

    def _object(self, value: Any, schema: dict[str, Any]) -> bool:
        if not isinstance(value, dict):
            return True
        if any(isinstance(name, str) and name not in value for name in self._counted(schema.get("required"))):
            return False
        known = schema.get("properties")
        known = known if isinstance(known, dict) else {}
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        return all(self.fits(each, known.get(name, others)) for name, each in value.items())

    def _array(self, value: Any, schema: dict[str, Any]) -> bool:
        if not isinstance(value, list):
            return True
        first = _list(schema.get("prefixItems"))
        items = schema.get("items", True)
        return all(self.fits(each, first[at] if at < len(first) else items) for at, each in enumerate(value))

    def _counted(self, value: Any) -> Sequence[Any]:
        found = _list(value)
        self._count(len(found))
        return found

    def _combined(self, value: Any, schema: dict[str, Any]) -> bool:
        if not all(self.fits(value, each) for each in _list(schema.get("allOf"))):
            return False
        return all(
            any(self.fits(value, each) for each in choices)
            for choices in (_list(schema.get("anyOf")), _list(schema.get("oneOf")))
            if choices
        )


def _list(value: Any, otherwise: Sequence[Any] = ()) -> Sequence[Any]:
    return value if isinstance(value, list) else otherwise
