"""What bodies of Ollama's API may hold. Everything else is ignored: a client does not decide here how models are
loaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fleet_worker.gateway.dialects.client_body import ClientBody

WAYS_OUT = {
    "format": 'it is "json" or a JSON schema',
    "tools": 'a tool is {"type": "function", "function": {"name": "...", "parameters": {...}}}',
    "think": 'it is true, false, "low", "medium" or "high"',
}
"""What to do about a refused field."""
_KINDS_OF_IMAGE = {"iVBORw": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}
"""By the first characters of its base64."""


def _image_url(image: Any) -> Any:
    """Return a data URL. Ollama's clients send base64 without the kind of image."""
    if not isinstance(image, str) or image.startswith("data:image/"):
        return image
    kind = next((kind for start, kind in _KINDS_OF_IMAGE.items() if image.startswith(start)), None)
    if kind is None:
        raise ValueError("is no PNG, JPEG, GIF or WebP image in base64")
    return f"data:image/{kind};base64,{image}"


def _model_name(name: Any) -> Any:
    """Return the name without the tag that Ollama's clients add to a name without one."""
    return name.removesuffix(":latest") if isinstance(name, str) else name


Image = Annotated[str, BeforeValidator(_image_url)]
Images = Annotated[list[Image], Field(fail_fast=True)]
Integer = Annotated[int, Field(strict=False)]
"""Also a number like 100.0: so do some clients write integers."""


class CalledFunction(ClientBody):
    name: str = Field(min_length=1, repr=False)
    arguments: dict[str, Any] | str = Field({}, repr=False)


class ToolCall(ClientBody):
    id: str | None = Field(None, repr=False)
    function: CalledFunction


class Message(ClientBody):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = Field(None, repr=False)
    images: Images | None = Field(None, repr=False)
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(None, repr=False)
    tool_name: str | None = Field(None, repr=False)
    name: str | None = Field(None, repr=False)
    """What `tool_name` was called before."""
    tool_call_id: str | None = Field(None, repr=False)


class Options(ClientBody):
    """How to sample. The values are checked as those of any chat."""

    num_predict: Integer | None = None
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Integer | None = None
    stop: Annotated[list[str], Field(fail_fast=True)] | str | None = Field(None, repr=False)
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class Asking(ClientBody):
    """What all requests have in common."""

    model: Annotated[str, BeforeValidator(_model_name)] = Field(min_length=1)
    keep_alive: int | float | str | None = None


class Generation(Asking):
    """What chats and generations have in common."""

    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] = Field("", repr=False)
    options: Options = Options()
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool = False


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field([], repr=False)
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] = Field([], repr=False)


class GenerateRequest(Generation):
    prompt: str = Field("", repr=False)
    system: str = Field("", repr=False)
    images: Images = Field([], repr=False)
    suffix: str = Field("", repr=False)
    template: str = Field("", repr=False)
    context: Annotated[list[Any], Field(fail_fast=True)] = Field([], repr=False)
    raw: bool = False


class EmbedRequest(Asking):
    input: str | Annotated[list[str], Field(fail_fast=True)] = Field(repr=False)
    dimensions: int | None = None


class EmbeddingsRequest(Asking):
    prompt: str = Field(repr=False)


class ShowRequest(ClientBody):
    model: Annotated[str, BeforeValidator(_model_name)] | None = None
    name: Annotated[str, BeforeValidator(_model_name)] | None = None
    """What `model` was called before."""
