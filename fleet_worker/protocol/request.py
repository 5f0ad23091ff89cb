"""What a router sends to nodes (JSON): request envelopes of protocol version 2, and control messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol import clock, json_values, openai_fields
from fleet_worker.protocol.openai import WAYS_OUT, ChatParams, EmbedParams
from fleet_worker.protocol.wire import BrokerMessage, WireModel, explain, field_names

Operation = Literal["chat", "stream_chat", "embed"]
Priority = Literal["critical", "high", "normal", "low"]

LONGEST_ID: Final = 200
REQUEST_ID: Final = f"[!-~]{{1,{LONGEST_ID}}}"
"""The pattern of a request's id: visible ASCII characters. It is logged, and shown in Flower."""
REPLY_TO: Final = r"llm\.fleet\.reply\.[a-z0-9.-]+\.[1-9][0-9]{0,5}"
"""The pattern of a reply queue's name. It ends with the seconds after which the queue expires."""
LONGEST_NAME: Final = 255
"""Characters of a queue's name: more are not possible in AMQP."""
ReplyQueue = Annotated[str, Field(pattern=f"^{REPLY_TO}$", max_length=LONGEST_NAME)]
MOST_ATTEMPTS: Final = 1_000
MOST_CANCELLED: Final = 1_000
"""Requests that one message cancels."""
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


class Address(NamedTuple):
    """Where the reply to an attempt goes, and what it is a reply to."""

    request_id: str
    attempt: int
    reply_to: str

    @classmethod
    def of(cls, envelope: Any) -> Address:
        """Return the address of an envelope whose other fields need not be valid: with it, its router can be told so.

        Raises:
            InvalidRequest: a field is missing or not valid, so that there is no router to answer.
        """
        if not isinstance(envelope, dict):
            raise InvalidRequest("an envelope is a JSON object")
        request_id, attempt, reply_to = (envelope.get(key) for key in ("request_id", "attempt", "reply_to"))
        if not (isinstance(request_id, str) and re.fullmatch(REQUEST_ID, request_id)):
            raise InvalidRequest("an envelope without a request_id")
        if not (type(attempt) is int and 1 <= attempt <= MOST_ATTEMPTS):
            raise InvalidRequest("an envelope without the number of its attempt")
        if not (isinstance(reply_to, str) and len(reply_to) <= LONGEST_NAME and re.fullmatch(REPLY_TO, reply_to)):
            raise InvalidRequest("an envelope without a reply_to")
        return cls(request_id, attempt, reply_to)


class FleetRequest(WireModel):
    """The envelope of one attempt of a request."""

    protocol_version: Literal[2]
    request_id: str = Field(pattern=f"^{REQUEST_ID}$")
    correlation_id: str = Field(min_length=1, max_length=200)
    idempotency_key: str = Field(min_length=1, max_length=200)
    attempt: int = Field(ge=1, le=MOST_ATTEMPTS)
    operation: Operation
    provider: Literal["mlx"]
    provider_instance: str = Field(min_length=1)
    model: str = Field(min_length=1, max_length=200)
    params: ChatParams | EmbedParams = Field(repr=False)
    reply_to: ReplyQueue
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
        json_values.check(values, field_names)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _refusal(error) from None

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


def params_of_client(operation: Operation, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of the body of an OpenAI client are params of this operation; raises `InvalidRequest`. Everything
    else is dropped or refused: see `openai_fields`."""
    try:
        return openai_fields.of_client(body, _PARAMS[operation].model_fields)
    except ValidationError as error:
        raise _refusal(error) from None


AttemptId = tuple[
    Annotated[str, Field(min_length=1, max_length=LONGEST_ID)], Annotated[int, Field(ge=1, le=MOST_ATTEMPTS)]
]
"""The id of a request, and the number of an attempt."""


class ControlMessage(BrokerMessage):
    """Cancels or confirms requests, or asks for replies to be sent again. It always tells the time of its router."""

    node: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    """The node that it is for; None for all nodes."""
    cancelled: list[AttemptId] = Field(default=[], max_length=MOST_CANCELLED)
    """Ids of cancelled requests, each with the number of the last attempt that is cancelled."""
    missed: ReplyQueue | None = None
    """A reply queue whose router was disconnected for a moment: what was sent to it last must be sent again."""
    confirmed: list[AttemptId] = Field(default=[], max_length=MOST_CANCELLED)
    """Requests, and the attempts of them that nodes asked about: they are still wanted."""
    router: ReplyQueue | None = None
    """The reply queue of the router that sends this; None from an older version."""
    sent_at: float = 0.0
    """What the clock of that router showed."""


def _refusal(error: ValidationError) -> InvalidRequest:
    text, param = explain(error, WAYS_OUT)
    where: dict[str, Any] = {"param": param} if param else {}
    return InvalidRequest(text, **where)


def _check_size(envelope: Any, max_bytes: int) -> None:
    """Refuse what is not JSON (NaN is not), and more than `max_bytes` or `MOST_VALUES` of it without the
    `ATTEMPT_FIELDS`."""
    if isinstance(envelope, dict):
        envelope = {name: value for name, value in envelope.items() if name not in ATTEMPT_FIELDS}
    try:
        text = json.dumps(envelope, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        json_values.check(envelope, field_names)
        raise InvalidRequest("the request is not JSON: only finite numbers, text, lists and objects") from None
    if len(text) > max_bytes:
        raise InvalidRequest(f"the request is {len(text):,} bytes, the limit (max_body_bytes) is {max_bytes:,}")
    if json_values.has_more_values(text, json_values.MOST_VALUES):
        limit = f"{json_values.MOST_VALUES:,}"
        raise InvalidRequest(f"the request has more than {limit} numbers, strings, lists and objects: split it")
