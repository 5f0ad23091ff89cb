"""What every message on the wire has in common: frozen, strict, JSON, and silent about what is in it."""

from __future__ import annotations

import functools
import json
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from fleet_worker.errors import InvalidRequest

PROTOCOL_VERSION: Final = 2
MOST_LEVELS: Final = 100


class WireModel(BaseModel):
    """A message, or a part of one. It refuses what it does not know, and its errors do not quote what they refuse."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class ExtensibleModel(WireModel):
    """What one program of ours tells another, which may be older: it does not hear the fields that are new to it."""

    model_config = ConfigDict(extra="ignore")


class BrokerMessage(ExtensibleModel):
    """What fills the body of a broker message."""

    def encode(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def decode(cls, body: bytes | str) -> Self:
        """Raises `InvalidRequest` for anything else."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise InvalidRequest(f"not a valid {cls.__name__}: {explain(error)}") from None


def check_form(value: Any, levels: int = MOST_LEVELS) -> None:
    """Raises `InvalidRequest` for keys that are not text, which would come out as text, and for what is nested deeper
    than JSON libraries like."""
    if isinstance(value, dict | list | tuple):
        if levels == 0:
            raise InvalidRequest(f"the request is nested more than {MOST_LEVELS} levels deep")
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise InvalidRequest("the request is not JSON: the keys of an object are text")
        for part in value.values() if isinstance(value, dict) else value:
            check_form(part, levels - 1)


def check_size(value: Any, max_bytes: int) -> None:
    """Raises `InvalidRequest` for what is not JSON (a NaN is not) or more than `max_bytes` of it."""
    try:
        size = len(json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode())
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest("the request is not JSON: only finite numbers, text, lists and objects") from None
    if size > max_bytes:
        raise InvalidRequest(f"the request is {size:,} bytes, the limit (max_body_bytes) is {max_bytes:,}")


def explain(error: ValidationError) -> str:
    """Say where and why, without the value: it may be a prompt."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    shown = [f"{_where(fault) or 'request'}: {_why(fault)}" for fault in faults[:5]]
    more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
    return "; ".join(shown + more)


def _where(fault: ErrorDetails) -> str:
    """The path in names of ours only: the keys of a caller's object are data, and pydantic adds members of unions."""
    path, unknown = fault["loc"], []
    if fault["type"] == "extra_forbidden":
        path, unknown = path[:-1], [str(path[-1])[:40]]  # a name, not a value
    return ".".join([*(str(part) for part in path if isinstance(part, int) or part in _field_names()), *unknown])


def _why(fault: ErrorDetails) -> str:
    if fault["type"].startswith("union_tag"):  # pydantic's text repeats what stood there
        return "is of an unknown type"
    return fault["msg"].removeprefix("Value error, ")


@functools.cache
def _field_names() -> frozenset[str]:
    models = [WireModel]
    for model in models:
        models += model.__subclasses__()
    return frozenset(name for model in models for name in model.model_fields)
