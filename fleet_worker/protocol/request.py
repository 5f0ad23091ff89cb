"""The request envelope (protocol version 2, JSON), and the body of an OpenAI request that it carries."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.openai import ChatParams, EmbedParams
from fleet_worker.protocol.wire import WireModel, check_form, check_size, explain

LEGACY_KEYS = frozenset({"schema_version", "request_type", "fleet_correlation_id"})

OF_AN_ATTEMPT = frozenset({"attempt", "reply_to", "expires_at", "resume"})
"""Fields of an envelope that are new with each attempt. They do not count as its size: a node that would take the first
attempt at a request takes them all."""

Operation = Literal["chat", "stream_chat", "embed"]
Priority = Literal["critical", "high", "normal", "low"]


PARAMS: dict[str, type[ChatParams] | type[EmbedParams]] = {
    "chat": ChatParams,
    "stream_chat": ChatParams,
    "embed": EmbedParams,
}


class Resume(WireModel):
    """What of a streamed answer was delivered by earlier attempts: this attempt goes on from there."""

    content: str = Field("", repr=False)
    reasoning: str = Field("", repr=False)
    tokens: int = Field(0, ge=0)
    """How many it was, about: servers send a token at a time, or a few."""


class FleetRequest(WireModel):
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
    resume: Resume | None = None
    """Of a stream that was cut; without it the answer begins at its beginning."""

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

    @model_validator(mode="after")
    def _only_streams_resume(self) -> FleetRequest:
        if self.resume and self.operation != "stream_chat":
            raise ValueError("only a stream_chat can be resumed")
        return self

    @classmethod
    def decode(cls, raw: Any, *, max_bytes: int) -> FleetRequest:
        """Return the validated envelope.

        Raises:
            InvalidRequest: it is no valid envelope, or larger than `max_bytes` of JSON.
        """
        check_size(_without(OF_AN_ATTEMPT, raw), max_bytes)
        return cls.build(raw)

    @classmethod
    def build(cls, values: Any) -> FleetRequest:
        """Return the envelope of these fields; raises `InvalidRequest` for what a caller got wrong."""
        check_form(values)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InvalidRequest(explain(error)) from None

    def check_size(self, max_bytes: int) -> None:
        """Raises `InvalidRequest` for what `decode` would find too large, once it is sent."""
        check_size(_without(OF_AN_ATTEMPT, self.encode()), max_bytes)

    def addressed_to(self, reply_to: str, left: float | None = None) -> FleetRequest:
        """The same request, now: so many seconds are left of its time, or all of it."""
        seconds = self.timeout_seconds if left is None else left
        return self.model_copy(update={"reply_to": reply_to, "expires_at": time.time() + seconds})

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


def _without_nulls(params: Any) -> Any:
    """Drop fields that say nothing: OpenAI clients send nulls, and mlx_lm.server answers 400 to most of them."""
    if isinstance(params, dict):
        return {key: value for key, value in params.items() if value is not None}
    return params


def _without(names: frozenset[str], envelope: Any) -> Any:
    if isinstance(envelope, dict):
        return {name: value for name, value in envelope.items() if name not in names}
    return envelope
