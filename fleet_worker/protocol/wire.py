"""What all messages have in common: they are frozen and strict, and their errors quote nothing of a message."""

from __future__ import annotations

import functools
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails

from fleet_worker.config_file import nearest
from fleet_worker.errors import InvalidRequest

PROTOCOL_VERSION: Final = 2
MOST_ERRORS: Final = 200
"""Errors of one message that are looked at: pydantic takes 10 microseconds and a kilobyte to describe each."""


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = list(schema.values())
    for part in schema if isinstance(schema, list | tuple) else ():
        _fail_fast(part)


class WireModel(BaseModel):
    """A message or a part of one. Unknown fields are refused; errors do not contain the refused values."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let each list be refused at its first wrong value. The errors of a megabyte of wrong ones took a gigabyte."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


class ExtensibleModel(WireModel):
    """A message between our own programs, of which one may be older: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class BrokerMessage(ExtensibleModel):
    """The whole body of a broker message."""

    def encode(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def decode(cls, body: bytes | str) -> Self:
        """Return the message; raises `InvalidRequest` if the body is not valid."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise InvalidRequest(f"not a valid {cls.__name__}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Return where and why a message is invalid, without any value: it may be a prompt."""
    if error.error_count() > MOST_ERRORS:
        return f"{error.error_count():,} of its values are invalid"
    details = error.errors(include_input=False, include_url=False, include_context=False)
    details = [detail for detail in details if not _is_other_member(detail, details)]
    shown = [f"{_path(detail) or 'request'}: {_reason(detail)}" for detail in details[:5]]
    more = [f"and {len(details) - 5} more"] if len(details) > 5 else []
    return "; ".join(shown + more)


def _path(detail: ErrorDetails) -> str:
    """Return the path, with our own field names only: keys of a caller's objects are data, and pydantic adds the names
    of union members."""
    path, unknown = detail["loc"], []
    if detail["type"] == "extra_forbidden":
        path, unknown = path[:-1], [str(path[-1])[:40]]  # a name, not a value
    return ".".join([*(str(part) for part in path if isinstance(part, int) or part in _field_names()), *unknown])


def _is_other_member(detail: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """Tell whether this only says that a list is not text, where another detail says what is wrong in the list."""
    *place, member = detail["loc"] or ("",)
    deeper = (other["loc"] for other in details if len(other["loc"]) > len(detail["loc"]))
    return member == "str" and any(list(loc[: len(place)]) == place for loc in deeper)


def _reason(detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        name = str(detail["loc"][-1])
        return "unknown field" + ("" if name in _field_names() else nearest(name, _field_names()))
    if detail["type"].startswith("union_tag"):  # pydantic's text contains the value
        return "is of an unknown type"
    return detail["msg"].removeprefix("Value error, ")


@functools.cache
def _field_names() -> frozenset[str]:
    models = [WireModel]
    for model in models:
        models += model.__subclasses__()
    return frozenset(name for model in models for name in model.model_fields)
