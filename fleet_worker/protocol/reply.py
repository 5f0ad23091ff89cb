"""The frames of a reply (protocol version 2, JSON): what a node sends a router, and what a caller gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from fleet_worker.errors import FleetError
from fleet_worker.protocol.vectors import unpack_vector
from fleet_worker.protocol.wire import BrokerMessage, ExtensibleModel


class Usage(ExtensibleModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None


class Timings(ExtensibleModel):
    """Seconds. `queue_wait` from submission to acceptance, `ttft` and `duration` from acceptance."""

    queue_wait: float
    ttft: float | None = None
    duration: float
    tokens_per_second: float | None = None


class Delta(ExtensibleModel):
    """A piece of a streamed answer, as the server sent it; never cut inside a character."""

    content: str | None = Field(None, repr=False)
    reasoning: str | None = Field(None, repr=False)
    tool_calls: list[dict[str, Any]] | None = Field(None, repr=False)
    resumed: Literal[True] | None = None
    """Here another node goes on with the answer: an empty piece that the router puts in between."""


class Attempt(ExtensibleModel):
    """One try of a request, as the router saw it."""

    attempt: int
    node: str | None
    """None: nobody took it."""
    error: str | None
    """The code of what ended it; None if it answered."""
    delivered: int
    """Characters of the answer that had been delivered when it ended, those of earlier attempts included."""


class _Frame(ExtensibleModel):
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
    tokens: int
    """Of the answer so far, about: what the server sent one by one, those of earlier attempts included."""


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
    attempts: list[Attempt] = Field(default=[])
    """Filled in by the router, as in an `EmbedResponse`."""

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
    attempts: list[Attempt] = Field(default=[])

    @property
    def request_id(self) -> str:
        return self.id

    @cached_property
    def vectors(self) -> list[list[float]]:
        """The embeddings, in the order of the input."""
        return [unpack_vector(text).tolist() for text in self.data]


class Failure(_Frame):
    """The end of a request that failed."""

    kind: Literal["error"] = "error"
    code: str
    message: str
    error_class: str
    retryable: bool
    metadata: dict[str, Any]

    @classmethod
    def of(cls, error: FleetError, request_id: str, attempt: int, seq: int) -> Failure:
        """As this error crosses the wire; `error` is the way back."""
        return cls(
            id=request_id,
            attempt=attempt,
            seq=seq,
            code=error.code,
            message=error.message,
            error_class=type(error).__name__,
            retryable=error.retryable,
            metadata=error.metadata,
        )

    def error(self) -> FleetError:
        return FleetError.rebuild(self.code, self.message, retryable=self.retryable, metadata=self.metadata)


class Alive(_Frame):
    """The request is in progress; `seq` is that of the frame to come, and is not used up."""

    kind: Literal["alive"] = "alive"


Frame = Accepted | Deltas | ChatResponse | EmbedResponse | Failure | Alive


class Reply(BrokerMessage):
    """One broker message: the frames of all requests that a node owes a router since its last publish."""

    v: Literal[2]
    node: str
    frames: list[Annotated[Frame, Field(discriminator="kind")]]

    @classmethod
    def merged(cls, bodies: Sequence[bytes]) -> bytes:
        """One body with the frames of these, all of the same node."""
        first, *others = [cls.decode(body) for body in bodies]
        frames = [frame for reply in (first, *others) for frame in reply.frames]
        return first.model_copy(update={"frames": frames}).encode() if others else bodies[0]


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
