"""What a router sends to nodes (JSON): request envelopes of protocol version 2, and control messages."""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol import clock
from fleet_worker.protocol.openai import ChatParams, EmbedParams
from fleet_worker.protocol.wire import BrokerMessage, WireModel, explain

Operation = Literal["chat", "stream_chat", "embed"]
Priority = Literal["critical", "high", "normal", "low"]

MOST_LEVELS: Final = 100
"""How deep the JSON of an envelope may be nested."""
LEGACY_KEYS = frozenset({"schema_version", "request_type", "fleet_correlation_id"})
ATTEMPT_FIELDS = frozenset({"attempt", "reply_to", "expires_at", "resume"})
"""Fields that change with each attempt. They do not count for the size limit: a node that would accept the first
attempt of a request accepts all of them."""

_PARAMS: dict[str, type[ChatParams] | type[EmbedParams]] = {
    "chat": ChatParams,
    "stream_chat": ChatParams,
    "embed": EmbedParams,
}


class Resume(WireModel):
    """What earlier attempts delivered of a streamed answer: this attempt continues it."""

    content: str = Field("", repr=False)
    reasoning: str = Field("", repr=False)
    tokens: int = Field(0, ge=0)
    """Approximate number of tokens: servers send one or a few at a time."""


class FleetRequest(WireModel):
    """The envelope of one attempt of a request."""

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
    """The timeout that the caller set for the whole request."""
    expires_at: float
    """When that timeout is over, by the clock of the router (`protocol.clock`)."""
    priority: Priority
    resume: Resume | None = None
    """None if the answer starts from its beginning."""

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
    def _with_typed_params(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("an envelope is a JSON object")
        if legacy := LEGACY_KEYS & values.keys():
            raise ValueError(f"legacy keys are not accepted: {', '.join(sorted(legacy))}")
        if values.get("operation") == "stream":
            values = {**values, "operation": "stream_chat"}
        # The operation decides the type of params; for a union, pydantic would report the errors of both types.
        operation, params = values.get("operation"), values.get("params")
        kind = _PARAMS.get(operation) if isinstance(operation, str) else None
        if kind is None or "params" not in values or isinstance(params, kind):
            return values
        if isinstance(params, dict):  # OpenAI clients send nulls, and mlx_lm.server answers 400 to most of them
            params = {key: value for key, value in params.items() if value is not None}
        return {**values, "params": kind.model_validate(params)}

    @model_validator(mode="after")
    def _only_streams_resume(self) -> FleetRequest:
        if self.resume and self.operation != "stream_chat":
            raise ValueError("only a stream_chat can be resumed")
        return self

    @classmethod
    def build(cls, values: Any) -> FleetRequest:
        """Return the envelope with these fields; raises `InvalidRequest` if one is invalid."""
        _check_structure(values)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InvalidRequest(explain(error)) from None

    @classmethod
    def decode(cls, envelope: Any, *, max_bytes: int) -> FleetRequest:
        """Return the envelope that was received; raises `InvalidRequest` if it is invalid, or more than `max_bytes` of
        JSON."""
        _check_size(envelope, max_bytes)
        return cls.build(envelope)

    def encode(self) -> dict[str, Any]:
        envelope = self.model_dump(exclude={"params"})
        envelope["params"] = self.params.model_dump(exclude_none=True)
        return envelope

    def check_size(self, max_bytes: int) -> None:
        """Raise `InvalidRequest` if `decode` would refuse this envelope as too large."""
        _check_size(self.encode(), max_bytes)

    def addressed_to(self, reply_to: str, seconds: float | None = None) -> FleetRequest:
        """Return the envelope with this reply queue, expiring in so many seconds (default: after the whole timeout)."""
        seconds = self.timeout_seconds if seconds is None else seconds
        return self.model_copy(update={"reply_to": reply_to, "expires_at": clock.now() + seconds})

    @property
    def submitted_at(self) -> float:
        """When its caller submitted it, by the clock of the router."""
        return self.expires_at - self.timeout_seconds

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, in the process of the router only."""
        return min(self.timeout_seconds, self.expires_at - clock.now())


class ControlMessage(BrokerMessage):
    """Cancels or confirms requests, or asks for replies to be sent again. It always tells the time of its router."""

    node: str | None = None
    """The node that it is for; None for all nodes."""
    cancelled: list[tuple[str, int]] = Field(default=[])
    """Ids of cancelled requests, each with the number of the last attempt that is cancelled."""
    missed: str | None = None
    """A reply queue whose router was disconnected for a moment: what was sent to it last must be sent again."""
    confirmed: list[tuple[str, int]] = Field(default=[])
    """Requests, and the attempts of them that nodes asked about: they are still wanted."""
    router: str | None = None
    """The reply queue of the router that sends this; None from an older version."""
    sent_at: float = 0.0
    """What the clock of that router showed."""


def _check_structure(value: Any, levels: int = MOST_LEVELS) -> None:
    """Refuse keys that are not text (JSON would change them to text), and deeper nesting than JSON libraries accept."""
    if isinstance(value, dict | list | tuple):
        if levels == 0:
            raise InvalidRequest(f"the request is nested more than {MOST_LEVELS} levels deep")
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise InvalidRequest("the request is not JSON: the keys of an object are text")
        for part in value.values() if isinstance(value, dict) else value:
            _check_structure(part, levels - 1)


def _check_size(envelope: Any, max_bytes: int) -> None:
    """Refuse what is not JSON (NaN is not), or is more than `max_bytes` of it without the `ATTEMPT_FIELDS`."""
    if isinstance(envelope, dict):
        envelope = {name: value for name, value in envelope.items() if name not in ATTEMPT_FIELDS}
    try:
        size = len(json.dumps(envelope, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode())
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest("the request is not JSON: only finite numbers, text, lists and objects") from None
    if size > max_bytes:
        raise InvalidRequest(f"the request is {size:,} bytes, the limit (max_body_bytes) is {max_bytes:,}")
