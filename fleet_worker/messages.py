"""What travels: the request envelope, and the frames of a reply (protocol version 2, JSON).

All models are frozen, refuse what they do not know, and never show a prompt, a completion or a vector in their repr.
"""

from __future__ import annotations

import base64
import functools
import json
import sys
import time
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from fleet_worker.errors import FleetError, InvalidRequest
from fleet_worker.lanes import Priority

__all__ = [
    "PROTOCOL_VERSION",
    "Accepted",
    "Alive",
    "ChatParams",
    "ChatResponse",
    "Delta",
    "Deltas",
    "EmbedParams",
    "EmbedResponse",
    "Failure",
    "FleetRequest",
    "Frame",
    "Operation",
    "Reply",
    "Timings",
    "Usage",
    "join",
    "pack_vector",
]

PROTOCOL_VERSION: Final = 2
LEGACY_KEYS = frozenset({"schema_version", "request_type", "fleet_correlation_id"})

Operation = Literal["chat", "stream_chat", "embed"]


class _Wire(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        ser_json_bytes="base64",
    )


# --- The request -----------------------------------------------------------------------------------------------------


class TextPart(_Wire):
    type: Literal["text"]
    text: str = Field(repr=False)


class ImageUrl(_Wire):
    url: str = Field(repr=False)
    detail: Literal["auto", "low", "high"] | None = None

    @field_validator("url")
    @classmethod
    def _inline(cls, url: str) -> str:
        # mlx_lm.server fetches http image URLs itself, even for text models: a door into the minis' network.
        if not url.startswith("data:image/"):
            raise ValueError("images travel as data:image/... URLs")
        return url


class ImagePart(_Wire):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Wire):
    """One turn. Fields that OpenAI clients echo back and no MLX server wants are dropped."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = Field(None, repr=False)
    name: str | None = Field(None, repr=False)
    tool_calls: list[dict[str, Any]] | None = Field(None, repr=False)
    tool_call_id: str | None = Field(None, repr=False)

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content")
        return self


class ChatTemplateKwargs(_Wire):
    """The safe ones: others reach into the server's tokenizer (`return_tensors` kills mlx_lm.server 0.32)."""

    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(None, ge=0)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None


class ChatParams(_Wire):
    """The body of an OpenAI chat completion without `model` and `stream`.

    The bounds keep out what is known to kill servers: mlx_lm.server 0.32 loses its generation thread for good to a
    `stop` that is not text, and to a `top_k` as large as the vocabulary.
    """

    messages: list[Message] = Field(min_length=1, repr=False)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1000)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=16, repr=False)
    tools: list[dict[str, Any]] | None = Field(None, repr=False)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = Field(None, repr=False)
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = Field(None, repr=False)
    logit_bias: dict[str, float] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    n: Literal[1] | None = None
    user: str | None = Field(None, repr=False)

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def has_images(self) -> bool:
        return any(
            isinstance(part, ImagePart)
            for message in self.messages
            if isinstance(message.content, list)
            for part in message.content
        )


class EmbedParams(_Wire):
    """The body of an OpenAI embedding without `model`; texts only, since token ids mean another thing to each model."""

    input: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, max_length=2048, repr=False)
    user: str | None = Field(None, repr=False)

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, texts: Any) -> Any:
        return [texts] if isinstance(texts, str) else texts


PARAMS: dict[str, type[ChatParams] | type[EmbedParams]] = {
    "chat": ChatParams,
    "stream_chat": ChatParams,
    "embed": EmbedParams,
}


class FleetRequest(_Wire):
    """The envelope: one request, or one attempt at it.

    `timeout_seconds` is what the caller allowed in all, `expires_at` (seconds since the epoch) when that is over.
    """

    protocol_version: Literal[2]
    request_id: str = Field(min_length=1, max_length=200)
    correlation_id: str = Field(min_length=1, max_length=200)
    idempotency_key: str = Field(min_length=1, max_length=200)
    attempt: int = Field(ge=1)
    operation: Operation
    provider: Literal["mlx"]
    provider_instance: str = Field(min_length=1)
    model: str = Field(min_length=1, max_length=200)
    params: ChatParams | EmbedParams = Field(repr=False)
    reply_to: str = Field(pattern=r"^llm\.fleet\.reply\.[a-z0-9.-]+\.[1-9][0-9]*$", max_length=255)
    message_context: dict[str, Any] = Field(repr=False)
    caller: dict[str, Any] = Field(repr=False)
    trace_context: dict[str, Any] = Field(repr=False)
    signed_token: str | None = Field(repr=False)
    timeout_seconds: float = Field(gt=0)
    expires_at: float
    priority: Priority

    @field_validator("message_context", "caller", "trace_context")
    @classmethod
    def _finite(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ValueError("only finite numbers, text, lists and objects") from None
        return value

    @model_validator(mode="before")
    @classmethod
    def _versioned(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("an envelope is a JSON object")
        if legacy := LEGACY_KEYS & values.keys():
            raise ValueError(f"legacy keys are not accepted: {', '.join(sorted(legacy))}")
        if values.get("operation") == "stream":
            values = {**values, "operation": "stream_chat"}
        # The operation decides what params mean; a union would report the faults of both.
        operation, params = values.get("operation"), values.get("params")
        kind = PARAMS.get(operation) if isinstance(operation, str) else None
        if kind is None or "params" not in values or isinstance(params, kind):
            return values
        return {**values, "params": kind.model_validate(_without_nulls(params))}

    @classmethod
    def decode(cls, raw: Any, *, max_bytes: int) -> FleetRequest:
        """Return the validated envelope.

        Raises:
            InvalidRequest: it is no valid envelope, or larger than `max_bytes` of JSON.
        """
        check_size(raw, max_bytes)
        return cls.build(raw)

    @classmethod
    def build(cls, values: Any) -> FleetRequest:
        """Return the envelope of these fields; raises `InvalidRequest` for what a caller got wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InvalidRequest(explain(error)) from None

    def submitted_to(self, reply_to: str) -> FleetRequest:
        """The same request, now: its time runs from here."""
        return self.model_copy(update={"reply_to": reply_to, "expires_at": time.time() + self.timeout_seconds})

    def encode(self) -> dict[str, Any]:
        body = self.model_dump(exclude={"params"})
        body["params"] = self.params.model_dump(exclude_none=True)
        return body

    @property
    def queue_wait(self) -> float:
        """Seconds since it was submitted, as far as two clocks agree."""
        return max(0.0, time.time() - (self.expires_at - self.timeout_seconds))

    @property
    def remaining(self) -> float:
        """Seconds until its deadline; never more than it was given, however wrong a clock is."""
        return min(self.timeout_seconds, self.expires_at - time.time())


def validate_params(operation: Operation, params: dict[str, Any], *, max_bytes: int) -> ChatParams | EmbedParams:
    """Return the checked body of a request; raises `InvalidRequest` before anything is sent."""
    try:
        check_size(params, max_bytes)
        return PARAMS[operation].model_validate(_without_nulls(params))
    except ValidationError as error:
        raise InvalidRequest(explain(error)) from None


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
    known = [str(part) for part in fault["loc"] if isinstance(part, int) or part in _field_names()]
    unknown = [str(fault["loc"][-1])[:40]] if fault["type"] == "extra_forbidden" else []  # a name, not a value
    return ".".join(known + unknown)


def _why(fault: ErrorDetails) -> str:
    if fault["type"].startswith("union_tag"):  # pydantic's text repeats what stood there
        return "is of an unknown type"
    return fault["msg"].removeprefix("Value error, ")


@functools.cache
def _field_names() -> frozenset[str]:
    models = [_Wire]
    for model in models:
        models += model.__subclasses__()
    return frozenset(name for model in models for name in model.model_fields)


def _without_nulls(params: Any) -> Any:
    """Drop fields that say nothing: OpenAI clients send nulls, and mlx_lm.server answers 400 to most of them."""
    if isinstance(params, dict):
        return {key: value for key, value in params.items() if value is not None}
    return params


# --- The reply -------------------------------------------------------------------------------------------------------


class Usage(_Wire):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None


class Timings(_Wire):
    """Seconds. `queue_wait` from submission to acceptance, `ttft` and `duration` from acceptance."""

    queue_wait: float
    ttft: float | None = None
    duration: float
    tokens_per_second: float | None = None


class Delta(_Wire):
    """A piece of a streamed answer, as the server sent it; never cut inside a character."""

    content: str | None = Field(None, repr=False)
    reasoning: str | None = Field(None, repr=False)
    tool_calls: list[dict[str, Any]] | None = Field(None, repr=False)


class _Frame(_Wire):
    id: str
    attempt: int
    seq: int
    """Counts the frames of one attempt from 0 without a gap."""


class Accepted(_Frame):
    """A node took the request. Always seq 0."""

    kind: Literal["accepted"] = "accepted"
    instance: str
    queue_wait: float


class Deltas(_Frame):
    """The pieces that arrived together from the server, each as it was."""

    kind: Literal["deltas"] = "deltas"
    deltas: list[Delta]


class ChatResponse(_Frame):
    """The end of a chat. In a stream `content`, `reasoning` and `tool_calls` have travelled as deltas before."""

    kind: Literal["response"] = "response"
    node: str
    instance: str
    model: str
    content: str | None = Field(None, repr=False)
    reasoning: str | None = Field(None, repr=False)
    tool_calls: list[dict[str, Any]] = Field(default=[], repr=False)
    finish_reason: str
    usage: Usage
    timings: Timings

    @property
    def request_id(self) -> str:
        return self.id


class EmbedResponse(_Frame):
    """The end of an embedding; on the wire each vector is base64 of little-endian float32."""

    kind: Literal["embedding"] = "embedding"
    node: str
    instance: str
    model: str
    data: list[str] = Field(repr=False)
    dimensions: int
    usage: Usage
    timings: Timings

    @property
    def request_id(self) -> str:
        return self.id

    @cached_property
    def vectors(self) -> list[list[float]]:
        """The embeddings, in the order of the input."""
        return [unpack_vector(text) for text in self.data]


class Failure(_Frame):
    """The end of a request that failed."""

    kind: Literal["error"] = "error"
    code: str
    message: str
    error_class: str
    retryable: bool
    metadata: dict[str, Any]

    def error(self) -> FleetError:
        return FleetError.rebuild(self.code, self.message, retryable=self.retryable, metadata=self.metadata)


class Alive(_Frame):
    """The request is in progress; `seq` is that of the frame to come, and is not used up."""

    kind: Literal["alive"] = "alive"


Frame = Accepted | Deltas | ChatResponse | EmbedResponse | Failure | Alive


class Reply(_Wire):
    """One broker message: the frames of all requests that a node owes a router since its last publish."""

    v: Literal[2]
    node: str
    frames: list[Annotated[Frame, Field(discriminator="kind")]]

    def encode(self) -> bytes:
        return _REPLY.dump_json(self, exclude_none=True)

    @classmethod
    def decode(cls, body: bytes | str) -> Reply:
        """Raises `InvalidRequest` for anything that is not a reply of this protocol version."""
        try:
            return _REPLY.validate_json(body)
        except ValidationError as error:
            raise InvalidRequest(f"a reply that is not protocol version {PROTOCOL_VERSION}: {explain(error)}") from None


_REPLY = TypeAdapter(Reply)


def join(deltas: Iterable[Delta]) -> dict[str, Any]:
    """Return `content`, `reasoning` and `tool_calls` of the whole answer that came as these pieces."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.content:
            content.append(delta.content)
        if delta.reasoning:
            reasoning.append(delta.reasoning)
        for piece in delta.tool_calls or ():
            _extend_call(calls.setdefault(piece.get("index", len(calls)), {}), piece)
    return {
        "content": "".join(content) or None,
        "reasoning": "".join(reasoning) or None,
        "tool_calls": [calls[index] for index in sorted(calls)],
    }


def _extend_call(call: dict[str, Any], piece: dict[str, Any]) -> None:
    """OpenAI's rule: id, type and name come once, `function.arguments` comes in fragments."""
    for key in ("id", "type"):
        if piece.get(key):
            call[key] = piece[key]
    function = call.setdefault("function", {"name": "", "arguments": ""})
    given = piece.get("function") or {}
    function["name"] += given.get("name") or ""
    function["arguments"] += given.get("arguments") or ""


def pack_vector(vector: Sequence[float]) -> str:
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode("ascii")


def unpack_vector(text: str) -> list[float]:
    floats = array("f", base64.b64decode(text))
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tolist()
