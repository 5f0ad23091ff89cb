"""A dialect: how one API asks and is answered. Pure functions and writers, which know no HTTP and no router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_origin

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.problems import Problem
from fleet_worker.instance_settings import Capability
from fleet_worker.protocol.reply import ChatResponse, Delta, EmbedResponse

EVENT_STREAM = b"text/event-stream; charset=utf-8"
"""The media type of server-sent events."""


class Writer(Protocol):
    """Makes the answer to one chat: `whole`; or of a stream `begin`, then `deltas`, then `end` or `failed`.

    What each returns is written at once.
    """

    @property
    def heartbeat(self) -> bytes:
        """What keeps a silent stream open, and changes nothing."""

    @property
    def media_type(self) -> bytes:
        """The content type of a stream."""

    def whole(self, response: ChatResponse) -> bytes: ...

    def begin(self) -> bytes: ...

    def deltas(self, deltas: list[Delta]) -> bytes: ...

    def end(self, response: ChatResponse) -> bytes: ...

    def failed(self, problem: Problem) -> bytes:
        """Return the late error of a stream that has begun."""


class VectorWriter(Protocol):
    """Makes the answer to one embedding."""

    def whole(self, response: EmbedResponse) -> bytes: ...


@dataclass(frozen=True, slots=True)
class ChatAsked:
    """A chat that a client asks for."""

    model: str
    """As the client names it."""
    body: dict[str, Any]
    """The fields of an OpenAI chat completion, without `model` and `stream`: what `Router` takes as `body`."""
    stream: bool
    writer: Writer
    session: str | None = None
    """What the client calls its conversation, if it does."""


@dataclass(frozen=True, slots=True)
class EmbedAsked:
    """An embedding that a client asks for."""

    model: str
    body: dict[str, Any]
    writer: VectorWriter


@dataclass(frozen=True, slots=True)
class CountAsked:
    """A client asks how many tokens a chat has."""

    model: str
    body: dict[str, Any]
    """As of a `ChatAsked`."""
    answer: Callable[[int], bytes]
    """Makes the JSON of the answer."""


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """A client wants a model loaded, or unloaded. Here that is up to its operator: it gets an answer, nothing else."""

    model: str
    answer: bytes


Asked = ChatAsked | EmbedAsked | CountAsked | LoadAsked


def capability(asked: Asked) -> Capability | None:
    """Return what a model must be able to do, in the fleet's words; None if any model will do."""
    if isinstance(asked, ChatAsked):
        return "stream_chat" if asked.stream else "chat"
    return "embed" if isinstance(asked, EmbedAsked) else None


class Dialect(Protocol):
    """What the HTTP layer knows of a dialect. A module can be one."""

    def asked(self, body: dict[str, Any], request_id: str, created: int) -> Asked:
        """Read the body of a request. `created` is the time in whole seconds since the epoch.

        Raises:
            InvalidRequest: it is none. `param` names the field.
        """

    def problem_body(self, problem: Problem, request_id: str) -> bytes:
        """Return the JSON of an error before the answer has begun."""


def take_model(body: dict[str, Any]) -> str:
    """Remove the model from the body and return its name."""
    model = body.pop("model", None)
    if not isinstance(model, str) or not model:
        raise refused("model", "must be the name of a model: GET /v1/models lists them")
    return model


def take_switch(body: dict[str, Any], name: str, default: bool = False) -> bool:
    """Remove a boolean from the body and return it, or the default if it is missing or null."""
    value = body.pop(name, None)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise refused(name, "must be true or false")
    return value


def finish_reason(response: ChatResponse) -> Literal["stop", "length", "tool_calls"]:
    """Return why the answer ended, in OpenAI's words. Servers end some answers that call tools with `stop`."""
    if response.finish_reason == "length":
        return "length"
    return "tool_calls" if response.tool_calls else "stop"


_KINDS: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    list: "a list",
    dict: "an object",
}
T = TypeVar("T", str, bool, int, list[Any], dict[str, Any])


def given(body: Mapping[str, Any], name: str, kind: type[T], at: str = "") -> T | None:
    """Return a field, or None if it is missing or null. `at` is the path of the body, with a dot at its end."""
    value = body.get(name)
    known = get_origin(kind) or kind
    if value is not None and (not isinstance(value, known) or (known is int and isinstance(value, bool))):
        raise refused(f"{at}{name}", f"must be {_KINDS[known]}")
    return value


def refused(param: str, reason: str) -> InvalidRequest:
    """Return the error of a field. `param` is its path, as in `input.0.content`; `reason` tells what to do."""
    return InvalidRequest(f"{param}: {reason}", param=param)
