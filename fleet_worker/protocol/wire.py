"""What all messages have in common: they are frozen and strict, and their errors quote nothing of a message."""

from __future__ import annotations

import functools
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol import refusals

PROTOCOL_VERSION: Final = 2
MOST_ERRORS: Final = 200
"""Errors of one message that are described: pydantic takes 10 microseconds and a kilobyte for each."""


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
            raise InvalidRequest(f"not a valid {cls.__name__}: {explain(error)[0]}") from None


def explain(error: ValidationError, ways_out: dict[str, str] | None = None) -> tuple[str, str | None]:
    """Return where and why a message is invalid, without any value, and the path of the first refused field."""
    if (count := error.error_count()) > MOST_ERRORS:
        return f"{count:,} of its fields are wrong", None
    return refusals.explain(error, field_names(), ways_out or {})


@functools.cache
def field_names() -> frozenset[str]:
    """Return the names of the fields of all messages."""
    models = [WireModel]
    for model in models:
        models += model.__subclasses__()
    return frozenset(name for model in models for name in model.model_fields)
