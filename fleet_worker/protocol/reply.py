"""The frames of a reply (protocol version 2, JSON): what a node sends to a router, and a caller gets."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import to_json

from fleet_worker.errors import FleetError
from fleet_worker.protocol.request import LONGEST_ID, MOST_ATTEMPTS
from fleet_worker.protocol.wire import PROTOCOL_VERSION, BrokerMessage, ExtensibleModel

MOST_FRAMES = 20_000
"""Frames of one message that a router reads. Nodes send fewer."""
MOST_TOKENS = 2**53
CacheOutcome = Literal["hit", "miss", "cold", "moved"]
"""What became of a prompt whose beginning a server may have in its prompt cache:

hit: the server had at least half of what the warmest one was believed to have. miss: it was believed to have that, and
had not. moved: the warmest was another one, which was too busy, gone or failed. cold: none was believed to have any.
"""


class Usage(ExtensibleModel):
    """Token counts, as far as the server reports them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None


class Timings(ExtensibleModel):
    """Seconds: `queue_wait` from submission to acceptance, `ttft` (first token) and `duration` from acceptance.

    No two of them are measured with the clocks of two hosts: the router measures `queue_wait`, the node the others.
    """

    queue_wait: float
    ttft: float | None = None
    duration: float
    tokens_per_second: float | None = None


def _joinable(fragments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check all that `join` reads, so that a reply which cannot be joined is refused before anybody joins it."""
    for fragment in fragments:
        function = fragment.get("function") or {}
        texts = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (0,)
        if not isinstance(fragment.get("index", 0), int) or not all(isinstance(text, str | None) for text in texts):
            raise ValueError("must be fragments of tool calls")
    return fragments


class Delta(ExtensibleModel):
    """A piece of a streamed answer, as the server sent it. Characters are never split."""

    content: str | None = Field(None, repr=False)
    reasoning: str | None = Field(None, repr=False)
    tool_calls: Annotated[list[dict[str, Any]], AfterValidator(_joinable)] | None = Field(None, repr=False)
    resumed: Literal[True] | None = None
    """True for an empty delta that the router inserts where another node continues the answer."""

    @classmethod
    def of(cls, content: str | None, reasoning: str | None, tool_calls: list[dict[str, Any]] | None) -> Delta | None:
        """Return a delta of what is not empty, or None if all is."""
        if reasoning or tool_calls:
            return cls(content=content or None, reasoning=reasoning or None, tool_calls=tool_calls or None)
        return cls(content=content) if content else None


class Attempt(ExtensibleModel):
    """One attempt of a request, as the router saw it."""

    attempt: int
    node: str | None
    """None if no node accepted it."""
    error: str | None
    """The code of the error that ended it; None if it ended with a response."""
    delivered: int
    """Characters of the answer delivered by the end of this attempt, with those of earlier attempts."""


class _Frame(ExtensibleModel):
    id: str = Field(min_length=1, max_length=LONGEST_ID)
    attempt: int = Field(ge=1, le=MOST_ATTEMPTS)
    seq: int = Field(ge=0, le=MOST_TOKENS)
    """Number of the frame in its attempt, from 0 and without gaps."""


class Accepted(_Frame):
    """A node accepted the request. Always seq 0."""

    kind: Literal["accepted"] = "accepted"
    instance: str
    queue_wait: float
    """Seconds, as far as the node knows the clock of the router. The router measures it itself."""
    asks: Literal[True] | None = None
    """True if the router should confirm that it wants the attempt, or cancel it. Both tell the node the time."""


class Deltas(_Frame):
    """The deltas that arrived together from the server."""

    kind: Literal["deltas"] = "deltas"
    deltas: list[Delta]
    tokens: int = Field(ge=0, le=MOST_TOKENS)
    """Approximate number of tokens of the answer so far, with those of earlier attempts."""


class _Response(_Frame):
    node: str
    instance: str
    model: str
    usage: Usage
    timings: Timings
    attempts: list[Attempt] = Field(default=[])
    """All attempts of the request; filled in by the router."""

    @property
    def request_id(self) -> str:
        return self.id


class ChatResponse(_Response):
    """The end of a chat. A stream has sent `content`, `reasoning` and `tool_calls` as deltas before."""

    kind: Literal["response"] = "response"
    content: str | None = Field(None, repr=False)
    reasoning: str | None = Field(None, repr=False)
    tool_calls: list[dict[str, Any]] = Field(default=[], repr=False)
    finish_reason: str
    stop_string: str | None = Field(None, repr=False)
    """The one of the request that ended it; None if the server cut it off itself, or none did."""
    cache: CacheOutcome | None = None
    """Filled in by the router; None if the server does not say what it had, or with `router.affinity = false`."""
    metadata: dict[str, Any] = Field(default={})
    """`dropped_parameters`: names of those that had no influence, since this kind of server does not know them."""


class EmbedResponse(_Response):
    """The end of an embedding. Each vector in `data` is base64 of little-endian float32."""

    kind: Literal["embedding"] = "embedding"
    data: list[str] = Field(repr=False)
    dimensions: int

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
        """Return the frame of this error; `error` is the inverse."""
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
    """The request is in progress. `seq` is the number of the next frame, which will have it too."""

    kind: Literal["alive"] = "alive"


LastFrame = ChatResponse | EmbedResponse | Failure
"""With one of these a reply ends."""
Frame = Accepted | Deltas | LastFrame | Alive


class Reply(BrokerMessage):
    """One message of a node to a router: the frames of all requests since its last message to that router."""

    v: Literal[2]
    node: str = Field(max_length=255)
    frames: list[Annotated[Frame, Field(discriminator="kind")]] = Field(max_length=MOST_FRAMES)

    @staticmethod
    def encoded(node: str, frames: Sequence[Frame]) -> bytes:
        """Return the body of a message with these frames: that of `encode`, for a quarter of its time."""
        return to_json({"v": PROTOCOL_VERSION, "node": node, "frames": frames}, exclude_none=True)

    @classmethod
    def merged(cls, bodies: Sequence[bytes]) -> bytes:
        """Return one body with the frames of all these, which are of the same node."""
        first, *others = [cls.decode(body) for body in bodies]
        frames = [frame for reply in (first, *others) for frame in reply.frames]
        return first.model_copy(update={"frames": frames}).encode() if others else bodies[0]


def join(deltas: Iterable[Delta]) -> dict[str, Any]:
    """Return `content`, `reasoning` and `tool_calls` of the whole answer."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        if delta.content:
            content.append(delta.content)
        if delta.reasoning:
            reasoning.append(delta.reasoning)
        for fragment in delta.tool_calls or ():
            index = fragment.get("index", len(calls))
            _extend_call(calls.setdefault(index, {}), fragment)
            arguments.setdefault(index, []).append((fragment.get("function") or {}).get("arguments") or "")
    for index, parts in arguments.items():
        calls[index]["function"]["arguments"] = "".join(parts)
    return {
        "content": "".join(content) or None,
        "reasoning": "".join(reasoning) or None,
        "tool_calls": [calls[index] for index in sorted(calls)],
    }


def _extend_call(call: dict[str, Any], fragment: dict[str, Any]) -> None:
    """Add a fragment. As OpenAI defines it, id, type and name come once, `function.arguments` comes in parts. A server
    may write another id into each: the first counts, as for who reads the stream."""
    for key in ("id", "type"):
        if fragment.get(key):
            call.setdefault(key, fragment[key])
    function = call.setdefault("function", {"name": "", "arguments": ""})
    given = fragment.get("function") or {}
    function["name"] += given.get("name") or ""


def pack_vector(vector: array[float]) -> str:
    """Return this float32 array as base64 of little-endian float32. The array may be changed."""
    if sys.byteorder == "big":
        vector.byteswap()
    return base64.b64encode(vector).decode("ascii")


def unpack_vector(text: str) -> array[float]:
    """Return the float32 array; raises `ValueError` if the text is not base64 of whole float32 values."""
    vector = array("f", base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        vector.byteswap()
    return vector
