"""What a body of Anthropic's Messages may hold, checked field by field. Everything else is ignored, as the many fields
of betas are: they change nothing about an answer of this fleet."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fleet_worker.gateway.dialects.client_body import ClientBody

MOST_STOPS = 16
"""As many as a node searches in an answer."""
WAYS_OUT = {
    "content": "a message holds text, image, document, tool_use, tool_result and thinking blocks",
    "format": 'it is {"type": "json_schema", "schema": {...}}',
    "tool_choice": 'it is {"type": "auto"}, "any", "none", or "tool" with the name of one',
    "tools": 'a tool is {"name": "...", "description": "...", "input_schema": {...}}',
}
"""What to do about a refused field."""


class TextBlock(ClientBody):
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


class Base64Image(ClientBody):
    type: Literal["base64"]
    media_type: str = Field(pattern=r"^image/[a-z0-9.+-]{1,40}$")
    data: str = Field(min_length=1, repr=False)


class ImageBlock(ClientBody):
    type: Literal["image"]
    source: Annotated[Base64Image, BeforeValidator(_given_here)]


TextOrImage = Annotated[TextBlock | ImageBlock, Field(discriminator="type")]


class PlainText(ClientBody):
    type: Literal["text"]
    data: str = Field(repr=False)


class Excerpts(ClientBody):
    type: Literal["content"]
    content: str | Annotated[list[TextOrImage], Field(fail_fast=True)] = Field(repr=False)


class DocumentBlock(ClientBody):
    type: Literal["document"]
    source: Annotated[Annotated[PlainText | Excerpts, Field(discriminator="type")], BeforeValidator(_readable)]
    title: str | None = Field(None, repr=False)
    context: str | None = Field(None, repr=False)


class SearchResultBlock(ClientBody):
    type: Literal["search_result"]
    source: str = Field(repr=False)
    title: str = Field(repr=False)
    content: Annotated[list[TextBlock], Field(fail_fast=True)] = Field(repr=False)


class ToolReferenceBlock(ClientBody):
    """The result of a search for tools: the model may call this one now. Here it could before."""

    type: Literal["tool_reference"]
    tool_name: str = Field(repr=False)


class ToolUseBlock(ClientBody):
    type: Literal["tool_use"]
    id: str = Field(min_length=1, repr=False)
    name: str = Field(min_length=1, repr=False)
    input: dict[str, Any] = Field(repr=False)


class ToolResultBlock(ClientBody):
    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, repr=False)
    content: str | Annotated[list[ResultPart], Field(fail_fast=True)] | None = Field(None, repr=False)
    is_error: bool | None = None


class ThinkingBlock(ClientBody):
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


class Turn(ClientBody):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)] = Field(repr=False)


class Tool(ClientBody):
    """One of the client's own, or one that Anthropic defines: then `type` names it, with its version."""

    type: str | None = None
    name: str | None = Field(None, min_length=1, max_length=128, repr=False)
    description: str | None = Field(None, repr=False)
    input_schema: dict[str, Any] | None = Field(None, repr=False)


class Choice(ClientBody):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, repr=False)
    disable_parallel_tool_use: bool | None = None


class Thinking(ClientBody):
    type: str
    display: str | None = None


class Format(ClientBody):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema", repr=False)


class OutputConfig(ClientBody):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None


class Metadata(ClientBody):
    user_id: str | None = Field(None, repr=False)


class Prompt(ClientBody):
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
