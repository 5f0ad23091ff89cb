"""What a body of Anthropic's Messages may hold, checked field by field. Everything else is ignored, as the many fields
of betas are: they change nothing about an answer of this fleet."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.refusals import explain

MOST_STOPS = 16
"""As many as a node searches in an answer."""
_WAYS_OUT = {
    "content": "a message holds text, image, document, tool_use, tool_result and thinking blocks",
    "format": 'it is {"type": "json_schema", "schema": {...}}',
    "tool_choice": 'it is {"type": "auto"}, "any", "none", or "tool" with the name of one',
    "tools": 'a tool is {"name": "...", "description": "...", "input_schema": {...}}',
}
"""What to do about a refused field."""


class _Given(BaseModel):
    """No error of it holds a value: that may be a prompt. A list is refused at its first wrong item."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextBlock(_Given):
    type: Literal["text"]
    text: str = Field(repr=False)


def _given_here(source: Any) -> Any:
    """Refuse what is elsewhere: nothing of this fleet fetches an address or keeps a file."""
    match source:
        case {"type": "url"}:
            raise ValueError("is an address, and none is fetched: put the content itself into the message")
        case {"type": "file"}:
            raise ValueError("is a file, and none are kept here: put its content into the message")
    return source


def _readable(source: Any) -> Any:
    match source:
        case {"type": "base64"}:
            raise ValueError('is a PDF, which no model here reads: send its text as a source of type "text"')
    return _given_here(source)


class Base64Image(_Given):
    type: Literal["base64"]
    media_type: str = Field(pattern=r"^image/[a-z0-9.+-]{1,40}$")
    data: str = Field(min_length=1, repr=False)


class ImageBlock(_Given):
    type: Literal["image"]
    source: Annotated[Base64Image, BeforeValidator(_given_here)]


TextOrImage = Annotated[TextBlock | ImageBlock, Field(discriminator="type")]


class PlainText(_Given):
    type: Literal["text"]
    data: str = Field(repr=False)


class Excerpts(_Given):
    type: Literal["content"]
    content: str | Annotated[list[TextOrImage], Field(fail_fast=True)] = Field(repr=False)


class DocumentBlock(_Given):
    type: Literal["document"]
    source: Annotated[Annotated[PlainText | Excerpts, Field(discriminator="type")], BeforeValidator(_readable)]
    title: str | None = Field(None, repr=False)
    context: str | None = Field(None, repr=False)


class SearchResultBlock(_Given):
    type: Literal["search_result"]
    source: str = Field(repr=False)
    title: str = Field(repr=False)
    content: Annotated[list[TextBlock], Field(fail_fast=True)] = Field(repr=False)


class ToolReferenceBlock(_Given):
    """The result of a search for tools: the model may call this one now. Here it could before."""

    type: Literal["tool_reference"]
    tool_name: str = Field(repr=False)


class ToolUseBlock(_Given):
    type: Literal["tool_use"]
    id: str = Field(min_length=1, repr=False)
    name: str = Field(min_length=1, repr=False)
    input: dict[str, Any] = Field(repr=False)


class ToolResultBlock(_Given):
    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, repr=False)
    content: str | Annotated[list[ResultPart], Field(fail_fast=True)] | None = Field(None, repr=False)
    is_error: bool | None = None


class ThinkingBlock(_Given):
    """Sent back by clients, as they must to Anthropic. Models think anew in each turn."""

    type: Literal["thinking", "redacted_thinking"]


ResultPart = Annotated[
    TextBlock | ImageBlock | DocumentBlock | SearchResultBlock | ToolReferenceBlock, Field(discriminator="type")
]
Block = Annotated[
    TextBlock | ImageBlock | DocumentBlock | SearchResultBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock,
    Field(discriminator="type"),
]
StopSequences = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(fail_fast=True)]


class Turn(_Given):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)] = Field(repr=False)


class Tool(_Given):
    """One of the client's own, or one that Anthropic defines: then `type` names it, with its version."""

    type: str | None = None
    name: str | None = Field(None, min_length=1, max_length=128, repr=False)
    description: str | None = Field(None, repr=False)
    input_schema: dict[str, Any] | None = Field(None, repr=False)


class Choice(_Given):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, repr=False)
    disable_parallel_tool_use: bool | None = None


class Thinking(_Given):
    type: str
    display: str | None = None


class Format(_Given):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema", repr=False)


class OutputConfig(_Given):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None


class Metadata(_Given):
    user_id: str | None = Field(None, repr=False)


class Prompt(_Given):
    """What a model is given to read: all that counts for its context window."""

    model: str = Field(min_length=1)
    messages: Annotated[list[Turn], Field(fail_fast=True)] = Field(min_length=1, repr=False)
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] = Field("", repr=False)
    tools: Annotated[list[Tool], Field(fail_fast=True)] = Field([], repr=False)
    tool_choice: Choice | None = None


class MessagesRequest(Prompt):
    """The body of `/v1/messages`."""

    max_tokens: int = Field(ge=1, le=1_000_000)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1000)
    stop_sequences: StopSequences = Field([], max_length=MOST_STOPS, repr=False)
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None
    metadata: Metadata | None = None
    mcp_servers: Annotated[list[Any], Field(fail_fast=True)] = Field([], repr=False)


Body = TypeVar("Body", bound=Prompt)


def read(kind: type[Body], body: dict[str, Any]) -> Body:
    """Return the body as this kind of request. A null counts as a field that is missing.

    Raises:
        InvalidRequest: it is none. `param` names the field.
    """
    try:
        return kind.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        text, param = explain(error, _FIELD_NAMES, _WAYS_OUT)
        raise InvalidRequest(text, param=param) from None


def _names(kind: type[BaseModel]) -> set[str]:
    own = {field.alias or name for name, field in kind.model_fields.items()}
    return own.union(*(_names(each) for each in kind.__subclasses__()))


_FIELD_NAMES = frozenset(_names(_Given))
