"""The objects of a chat that servers interpret: its tools, which of them to call, and the format of its answer.

They are checked here and sent as they were given: in a JSON schema even a null is a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from fleet_worker.protocol.openai_fields import refused
from fleet_worker.protocol.wire import WireModel

_LONGEST_NAME = 1000
"""As in answers: `mlx.tool_calls`."""


class _Shape(WireModel):
    """Fields that it does not name are left to the server."""

    model_config = ConfigDict(extra="ignore")


class _NamedFunction(_Shape):
    name: str = Field(min_length=1, max_length=_LONGEST_NAME, repr=False)


class _Function(_NamedFunction):
    description: str | None = Field(None, repr=False)
    parameters: dict[str, Any] | None = Field(None, repr=False)


class _Tool(_Shape):
    type: Literal["function"]
    function: _Function


class _Choice(_Shape):
    type: Literal["function"]
    function: _NamedFunction


class _Format(WireModel):
    """Other fields are refused: a `schema` beside `json_object` would have no effect."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Any = Field(None, repr=False)


def _checked_tool(tool: dict[str, Any]) -> dict[str, Any]:
    _Tool.model_validate(tool)
    return tool


def _checked_format(given: dict[str, Any]) -> dict[str, Any]:
    _Format.model_validate(given)
    return given


def _checked_choice(choice: dict[str, Any]) -> dict[str, Any]:
    _Choice.model_validate(choice)
    return choice


Tool = Annotated[dict[str, Any], AfterValidator(_checked_tool)]
ToolChoice = Literal["none", "auto", "required"] | Annotated[dict[str, Any], AfterValidator(_checked_choice)]
ResponseFormat = Annotated[dict[str, Any], AfterValidator(_checked_format)]


def check_choice(choice: str | dict[str, Any] | None, tools: Sequence[dict[str, Any]]) -> None:
    """Raise `ValidationError` if a `ToolChoice` asks for a tool that is not among the tools."""
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise refused("tool_choice", "asks for a tool, but the request has none: add tools, or leave it out")
    if isinstance(choice, dict) and choice["function"]["name"] not in [tool["function"]["name"] for tool in tools]:
        raise refused("tool_choice", "names a function that is not among the tools: use the name of one of them")
