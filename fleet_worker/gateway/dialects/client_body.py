"""The body of a request in a form of its own API, checked field by field before it is translated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.refusals import explain


class ClientBody(BaseModel):
    """A body or a part of one. Other fields are ignored. No error holds a value: that may be a prompt.

    Each list needs `Field(fail_fast=True)`: the errors of a megabyte of wrong items would fill the memory.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


Body = TypeVar("Body", bound=ClientBody)


def read(kind: type[Body], body: Mapping[str, Any], ways_out: dict[str, str]) -> Body:
    """Return the body as this kind of request. A null counts as a field that is missing.

    `ways_out` tells what to do about a field.

    Raises:
        InvalidRequest: it is none. `param` names the field.
    """
    try:
        return kind.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        text, param = explain(error, _field_names(ClientBody), ways_out)
        raise InvalidRequest(text, param=param) from None


def _field_names(kind: type[BaseModel]) -> set[str]:
    own = {field.alias or name for name, field in kind.model_fields.items()}
    return own.union(*(_field_names(each) for each in kind.__subclasses__()))
