"""Why a message is refused, in our words: which field, what is given and what is needed, without any value.

A value may be a prompt, and the texts of pydantic name its own types.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fleet_worker.config_file import nearest
from fleet_worker.protocol.json_values import kind_of

SHOWN = 5
"""Refused fields that one text names."""
LONGEST_NAME = 40
"""Characters of a caller's field name that are shown."""

_NEEDED = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer, without a decimal point",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:.17g}",
    "greater_than_equal": "at least {ge:.17g}",
    "less_than": "less than {lt:.17g}",
    "less_than_equal": "at most {le:.17g}",
    "string_pattern_mismatch": "a string of the form that such names have",
    "string_too_short": "a string that is not empty",
    "string_too_long": "a string of at most {max_length} characters",
    "too_short": "a list that is not empty",
    "too_long": "a list of at most {max_length} items",
    "union_tag_invalid": "of one of these types: {expected_tags}",
    "union_tag_not_found": "an object with a type",
}
"""By type of pydantic's error, with the names of its context."""
_RIGHT_KIND = (
    "greater_than",
    "less_than",
    "finite_number",
    "string_pattern",
    "string_too",
    "too_",
    "union_tag",
    "int_from_float",
)
"""The beginning of the types of errors for which a value of the right kind is given."""


def explain(error: ValidationError, field_names: Collection[str], ways_out: dict[str, str]) -> tuple[str, str | None]:
    """Return the text of a refusal, and the path of the first field that it names, as in `messages.0.content`.

    Of a path only `field_names` are shown, and the numbers of list items: other keys are data. `ways_out` tells what to
    do about a field.
    """
    details = [_Fault(detail, field_names) for detail in error.errors(include_url=False)]
    details = [fault for fault in details if not fault.is_of_other_member(details)]
    by_place: dict[tuple[str, bool], list[_Fault]] = {}
    for fault in details:
        by_place.setdefault((fault.path, fault.is_plain), []).append(fault)
    faults = [f"{path or 'request'}: {_reason(each)}" for (path, _), each in list(by_place.items())[:SHOWN]]
    more = [f"and {len(by_place) - SHOWN} more"] if len(by_place) > SHOWN else []
    advice = dict.fromkeys(fault.way_out(ways_out) for fault in details)
    text = "; ".join([*faults, *more]) + "".join(f" ({each})" for each in advice if each)
    return text, next(iter(by_place))[0] or None


def _reason(faults: list[_Fault]) -> str:
    first = faults[0]
    if not first.is_plain:
        return first.reason
    return f"must be {' or '.join(dict.fromkeys(fault.needed for fault in faults))}{first.instead}"


class _Fault:
    """One detail of pydantic's error."""

    def __init__(self, detail: ErrorDetails, field_names: Collection[str]) -> None:
        self._type, self._place, self._input = detail["type"], detail["loc"], detail["input"]
        self._message, self._context = detail["msg"], detail.get("ctx", {})
        self._field_names = field_names
        self.path = ".".join(self._path())

    @property
    def is_plain(self) -> bool:
        """Return whether the value must only be another one: such faults at one place are told together."""
        return self._type in _NEEDED

    @property
    def needed(self) -> str:
        return _NEEDED[self._type].format(**self._context)

    @property
    def instead(self) -> str:
        if not self.is_of_wrong_kind:
            return ""
        kind = kind_of(self._input)
        of_that_kind = (kind == "a string") == str(self._context.get("expected", "")).startswith("'")
        is_another = self._type == "literal_error" and of_that_kind
        return f", not {kind.replace('a ', 'another ', 1) if is_another else kind}"

    @property
    def is_of_wrong_kind(self) -> bool:
        return self.is_plain and not self._type.startswith(_RIGHT_KIND)

    def way_out(self, ways_out: dict[str, str]) -> str:
        """Return what to do about a value of a wrong kind, or about an object in which a field is missing."""
        parts = self.path.split(".")
        if self._type == "missing":
            parts = parts[:-1]
        elif not self.is_of_wrong_kind:
            return ""
        return next((ways_out[part] for part in reversed(parts) if part in ways_out), "")

    @property
    def reason(self) -> str:
        """Return what is wrong, where that is not only the kind of a value."""
        match self._type:
            case "missing":
                return "is missing"
            case "extra_forbidden":
                name = str(self._place[-1])
                return "unknown field" + ("" if name in self._field_names else nearest(name, self._field_names))
            case "string_unicode":  # a message of the broker: those of callers are checked before
                return "must be a string of whole characters"
            case "value_error":
                return str(self._context["error"])
            case "unsupported":
                return self._message
        return "is not valid"

    def is_of_other_member(self, faults: Iterable[_Fault]) -> bool:
        """Tell whether this only says that a list or an object is not text, where another fault is inside it."""
        *place, member = self._place or ("",)
        deeper = (other._place for other in faults if len(other._place) > len(self._place))
        is_text = member == "str" or str(member).startswith("literal[")
        return is_text and any(list(other[: len(place)]) == place for other in deeper)

    def _path(self) -> list[str]:
        """Return the names and numbers of the place; pydantic adds the names of union members to it."""
        place, unknown = self._place, []
        if self._type in ("extra_forbidden", "unsupported"):
            place, unknown = place[:-1], [str(place[-1])[:LONGEST_NAME]]  # a name, not a value
        parts = [str(part) for part in place if isinstance(part, int) or part in self._field_names]
        parts = [part for at, part in enumerate(parts) if at == 0 or part != parts[at - 1]]
        return [*parts, *unknown]
