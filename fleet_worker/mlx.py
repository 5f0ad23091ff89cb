"""The client of one MLX server: chat, stream_chat, embed, models, health.

It expects what real servers do: streams that end without a word, errors inside a 200, any error shape, models that
are listed and not there. Everything foreign becomes one of our errors here and nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic_core import from_json, to_json
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from fleet_worker.errors import (
    ConfigurationError,
    ConnectionFailure,
    FleetError,
    InstanceUnavailable,
    MalformedOutput,
    Overloaded,
    ProviderError,
    RequestTimeout,
)
from fleet_worker.messages import ChatParams, Delta, Usage, join, pack_vector, unpack_vector
from fleet_worker.offerings import Offering
from fleet_worker.servers import QUIRKS, Quirks, chat_body, error_for, finish_reason, kind_of
from fleet_worker.settings import Instance
from fleet_worker.sse import EventStream
from fleet_worker.thinking import ThinkingSplitter, split_thinking
from fleet_worker.watchdog import Guard, Watchdog

__all__ = ["ChatAnswer", "ChatStream", "Embeddings", "Health", "MLXClient"]

DEFAULT_URLS = ("http://127.0.0.1:8000", "http://127.0.0.1:8080")
_AFTER_DONE = 1.0
_READ_BYTES_OF_ERROR = 64 * 1024

HTTPX_ERRORS: dict[type[Exception], type[FleetError]] = {
    httpx.ConnectError: InstanceUnavailable,
    httpx.ConnectTimeout: InstanceUnavailable,
    httpx.PoolTimeout: Overloaded,
    httpx.ReadTimeout: RequestTimeout,
    httpx.TimeoutException: RequestTimeout,
    httpx.DecodingError: MalformedOutput,
    httpx.TooManyRedirects: MalformedOutput,
    httpx.UnsupportedProtocol: ConfigurationError,
    httpx.InvalidURL: ConfigurationError,
    httpx.LocalProtocolError: ProviderError,
    httpx.HTTPError: ConnectionFailure,
}
"""From the particular to the general: the first that fits decides."""

_TEXTS: dict[type[FleetError], str] = {
    InstanceUnavailable: "the MLX server does not accept connections",
    Overloaded: "all connections to the MLX server are in use",
    RequestTimeout: "the MLX server did not answer in time",
    MalformedOutput: "the MLX server answered something that is not HTTP",
    ConfigurationError: "base_url of this instance cannot be used",
    ConnectionFailure: "the connection to the MLX server broke",
    ProviderError: "the request to the MLX server could not be made",
}


@contextmanager
def foreign_errors_mapped() -> Iterator[None]:
    """Turn what httpx raises into our errors. Its texts are left behind: they may name URLs and keys."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        kind = next(ours for theirs, ours in HTTPX_ERRORS.items() if isinstance(error, theirs))
        raise kind(_TEXTS[kind]) from None


@dataclass(frozen=True, slots=True)
class Health:
    """What `GET /health` says: not the truth, real servers say 200 with a dead generation thread."""

    ready: bool
    server: str


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """A whole chat; seconds are counted from the request to the server."""

    content: str | None
    reasoning: str | None
    tool_calls: list[dict[str, Any]]
    finish_reason: str
    usage: Usage
    ttft: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors as they travel: base64 of little-endian float32, in the order of the input."""

    data: list[str]
    dimensions: int
    usage: Usage


class MLXClient:
    """One pooled HTTP client for one instance; safe to share between threads.

    A `deadline` is monotonic seconds. Every method raises `FleetError`s only.
    """

    def __init__(
        self, instance: Instance, base_url: str, *, server: str = "openai", transport: httpx.BaseTransport | None = None
    ) -> None:
        self._instance = instance
        self._quirks: Quirks = QUIRKS[server]
        self._clocks = instance.clocks
        self._watchdog = Watchdog()
        slots = instance.limits.concurrency
        key = instance.api_key
        self._http = httpx.Client(
            base_url=base_url,
            headers={
                "accept-encoding": "identity",
                **({"authorization": f"Bearer {key.get_secret_value()}"} if key else {}),
            },
            transport=transport
            or httpx.HTTPTransport(
                trust_env=False,
                limits=httpx.Limits(
                    # A server that keeps connections closes them after 5 s of silence: be first.
                    max_connections=slots + 4,
                    max_keepalive_connections=slots + 4 if self._quirks.keeps_alive else 0,
                    keepalive_expiry=4.0,
                ),
            ),
            trust_env=False,
        )

    def close(self) -> None:
        self._watchdog.close()
        self._http.close()

    def chat(self, params: ChatParams, offering: Offering, *, deadline: float) -> ChatAnswer:
        """Return the whole answer. The server streams all the same: only a stream can be stopped."""
        with self._stream(params, offering, deadline, splitter=None) as stream:
            pieces = [delta for deltas in stream for delta in deltas]
        whole = join(pieces)
        if whole["content"] and not whole["reasoning"]:
            inside = offering.settings.starts_in_reasoning
            visible, reasoning = split_thinking(whole["content"], starts_inside=inside)
            whole |= {"content": visible or None, "reasoning": reasoning or None}
        return stream.answer(**whole)

    @contextmanager
    def stream_chat(self, params: ChatParams, offering: Offering, *, deadline: float) -> Iterator[ChatStream]:
        """Open a stream; iterate it, then ask for its `answer()`. Leaving the block stops the server."""
        splitter = ThinkingSplitter(starts_inside=offering.settings.starts_in_reasoning)
        with self._stream(params, offering, deadline, splitter=splitter) as stream:
            yield stream

    @contextmanager
    def _stream(
        self, params: ChatParams, offering: Offering, deadline: float, *, splitter: ThinkingSplitter | None
    ) -> Iterator[ChatStream]:
        body = chat_body(params, offering, self._quirks)
        with foreign_errors_mapped():
            started = time.monotonic()
            response = self._send("/v1/chat/completions", body, deadline)
            try:
                _raise_for_status(response)
                connection = response.extensions["network_stream"].get_extra_info("socket")
                limit = min(deadline, started + self._clocks.first_content)
                with self._watchdog.guard(connection, limit) as guard:
                    clock = _Clock(self._watchdog, guard, self._clocks.gap, deadline)
                    yield ChatStream(response, clock, self._quirks, splitter, body["max_tokens"], started)
            finally:
                response.close()

    def _send(self, path: str, body: dict[str, Any], deadline: float) -> httpx.Response:
        """Post and return the response once its headers are there; the body is still to be read.

        Only connecting is tried again: nothing has reached the server before.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise RequestTimeout("the deadline passed before the MLX server was asked")
        first = min(self._clocks.first_content, remaining)
        request = self._http.build_request(
            "POST",
            path,
            content=to_json(body),
            headers={"content-type": "application/json"},
            timeout=httpx.Timeout(first, connect=min(self._clocks.connect, remaining)),
        )
        for attempt in Retrying(
            retry=retry_if_exception_type((httpx.ConnectError, httpx.ConnectTimeout)),
            stop=stop_after_delay(min(self._clocks.connect, remaining)),
            wait=wait_exponential_jitter(initial=0.05, max=1.0, jitter=0.05),
            reraise=True,
        ):
            with attempt:
                return self._http.send(request, stream=True)
        raise AssertionError("tenacity returns or raises")

    def embed(self, texts: Sequence[str], offering: Offering, *, deadline: float) -> Embeddings:
        """Return one vector per text, asking the server in batches that it can take."""
        size = self._instance.limits.embed_batch
        data: list[str] = []
        tokens: list[int | None] = []
        dimensions = offering.settings.dimensions
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            answer = self._embed_batch(batch, offering, deadline)
            vectors, dimensions = _vectors(answer, len(batch), dimensions)
            data += vectors
            tokens.append(_usage(answer.get("usage")).prompt_tokens)
        total = None if None in tokens else sum(count or 0 for count in tokens)
        return Embeddings(data, dimensions or 0, Usage(prompt_tokens=total, total_tokens=total))

    def _embed_batch(self, texts: Sequence[str], offering: Offering, deadline: float) -> dict[str, Any]:
        body = {"model": offering.backend, "input": list(texts)}
        if self._quirks.base64_vectors:
            body["encoding_format"] = "base64"
        with foreign_errors_mapped():
            response = self._send("/v1/embeddings", body, deadline)
            try:
                _raise_for_status(response)
                connection = response.extensions["network_stream"].get_extra_info("socket")
                with self._watchdog.guard(connection, deadline) as guard:
                    content = response.read()
            finally:
                response.close()
        if guard.cut:
            raise RequestTimeout("the deadline passed while the MLX server computed embeddings")
        return _object(content)

    def models(self) -> list[str]:
        """Return the ids that `GET /v1/models` reports: a hint (a disk cache, an empty body, or one absolute path)."""
        response = self._get("/v1/models")
        _raise_for_status(response)
        if not response.content:  # mlx_lm.server without a model cache on disk
            return []
        listed = _object(response.content).get("data")
        if not isinstance(listed, list):
            raise MalformedOutput("the MLX server's list of models is not one")
        return [entry["id"] for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    def health(self) -> Health:
        """Ask `/health`; a server without it is ready if it answers at all.

        Raises:
            InstanceUnavailable: nothing listens there.
        """
        response = self._get("/health")
        try:
            said = from_json(response.content)
        except ValueError:
            said = None
        server = kind_of(response.http_version, response.headers, said)
        if response.status_code == 404:
            return Health(ready=True, server=server)
        status = said.get("status") if isinstance(said, dict) else None
        sick = status in ("unhealthy", "unavailable", "loading", "error")
        return Health(ready=response.is_success and not sick, server=server)

    def _get(self, path: str) -> httpx.Response:
        with foreign_errors_mapped():
            return self._http.get(path, timeout=httpx.Timeout(self._clocks.connect))


class _Clock:
    """The first-content, gap and deadline clocks of one stream, told to the watchdog as one limit."""

    def __init__(self, watchdog: Watchdog, guard: Guard, gap: float, deadline: float) -> None:
        self._watchdog = watchdog
        self._guard = guard
        self._gap = gap
        self._deadline = deadline
        self.flowing = False
        self.now = time.monotonic()

    def progress(self) -> None:
        """Content arrived."""
        self.now = time.monotonic()
        limit = min(self._deadline, self.now + self._gap)
        if self.flowing:
            self._guard.limit = limit
        else:
            self.flowing = True
            self._watchdog.hasten(self._guard, limit)

    def done(self) -> None:
        self._watchdog.hasten(self._guard, time.monotonic() + _AFTER_DONE)

    def check(self) -> None:
        """Raises `RequestTimeout` if the connection was cut, saying by which clock."""
        if not self._guard.cut:
            return
        if time.monotonic() >= self._deadline:
            raise RequestTimeout("the deadline passed while the MLX server was answering")
        if self.flowing:
            raise RequestTimeout(f"the MLX server fell silent in mid-answer for {self._gap:g} s (clocks.gap)")
        raise RequestTimeout("the MLX server sent no content in time (clocks.first_content)", retryable=True)


class ChatStream:
    """An open stream: iterate it for the deltas, as many at a time as arrived together."""

    def __init__(
        self,
        response: httpx.Response,
        clock: _Clock,
        quirks: Quirks,
        splitter: ThinkingSplitter | None,
        max_tokens: int,
        started: float,
    ) -> None:
        self._response = response
        self._clock = clock
        self._quirks = quirks
        self._splitter = splitter
        self._max_tokens = max_tokens
        self._started = started
        self._first: float | None = None
        self._last = started
        self._finish: str | None = None
        self._usage = Usage()
        self._done = False

    def __iter__(self) -> Iterator[list[Delta]]:
        """Raises a `FleetError` unless the stream was whole: a finish_reason, no error, and [DONE] where it is due."""
        events = EventStream()
        try:
            for received in self._response.iter_raw():
                if deltas := self._take(events.feed(received)):
                    yield deltas
            if deltas := self._take(events.end()):
                yield deltas
        except httpx.HTTPError:
            self._clock.check()
            if not self._done:
                raise
        self._clock.check() if not self._done else None
        if self._finish is None or (self._quirks.says_done and not self._done):
            raise ConnectionFailure("the MLX server ended the stream before the answer was whole")
        if self._splitter and (deltas := _visible(*self._splitter.end())):
            yield deltas

    def _take(self, events: list[bytes]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            if event == b"[DONE]":
                self._done = True
                self._clock.done()
                break
            deltas += self._deltas(event)
        if deltas and not self._done:
            self._clock.progress()
            self._last = self._clock.now
            self._first = self._first or self._last
        return deltas

    def _deltas(self, event: bytes) -> list[Delta]:
        chunk = _object(event)
        if chunk.get("error"):
            raise _error_event(chunk["error"])
        if chunk.get("usage"):
            self._usage = _usage(chunk["usage"])
        choices = chunk.get("choices")
        if not choices:
            return []
        try:
            choice = choices[0]
            if self._finish is None:  # mlx-omni-server repeats it
                self._finish = choice.get("finish_reason")
            return self._normalised(choice.get("delta") or {})
        except (TypeError, KeyError, AttributeError, ValueError):
            raise MalformedOutput("the MLX server sent a chunk that is not a chat completion chunk") from None

    def _normalised(self, delta: dict[str, Any]) -> list[Delta]:
        """One vocabulary for all servers: no role, no empty pieces, `reasoning` under one name, numbered tool calls."""
        content = delta.get("content")
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        calls = delta.get("tool_calls")
        if content and self._splitter:
            content, thought = self._splitter.feed(content)
            reasoning = (reasoning or "") + thought
        if calls:
            calls = [{"index": index, **call} for index, call in enumerate(calls)]
        if not (content or reasoning or calls):
            return []
        return [Delta(content=content or None, reasoning=reasoning or None, tool_calls=calls or None)]

    def answer(
        self, content: str | None = None, reasoning: str | None = None, tool_calls: list[dict[str, Any]] | None = None
    ) -> ChatAnswer:
        """Return how the finished stream ended, with the given text of it."""
        tokens = self._usage.completion_tokens
        elapsed = self._last - (self._first or self._last)
        return ChatAnswer(
            content=content,
            reasoning=reasoning,
            tool_calls=tool_calls or [],
            finish_reason=finish_reason(
                self._finish or "error", self._quirks, completion_tokens=tokens, max_tokens=self._max_tokens
            ),
            usage=self._usage,
            ttft=self._first and self._first - self._started,
            tokens_per_second=(tokens - 1) / elapsed if tokens and tokens > 1 and elapsed > 0 else None,
        )


def _visible(content: str, reasoning: str) -> list[Delta]:
    return [Delta(content=content or None, reasoning=reasoning or None)] if content or reasoning else []


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    if response.is_redirect:
        raise ConfigurationError("base_url of this instance answers with a redirect: name the server itself")
    body = b""
    for part in response.iter_raw() if not response.is_stream_consumed else [response.content]:
        body += part
        if len(body) > _READ_BYTES_OF_ERROR:
            break
    raise error_for(response.status_code, body, retry_after=_seconds(response.headers.get("retry-after")))


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:  # an HTTP date
        return None


def _error_event(error: Any) -> FleetError:
    """An error inside a 200: `code` is an HTTP status as a number or a string, or a word."""
    code = error.get("code") if isinstance(error, dict) else None
    status = int(code) if isinstance(code, int | str) and str(code).isdigit() else 500
    return error_for(status, to_json(error))


def _object(content: bytes) -> dict[str, Any]:
    try:
        parsed = from_json(content)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise MalformedOutput("the MLX server sent something that is not a JSON object")
    return parsed


def _usage(said: Any) -> Usage:
    """Only what is a count: servers leave out usage, send null, or nest details in it."""
    said = said if isinstance(said, dict) else {}
    details = said.get("prompt_tokens_details")
    counts = {**(details if isinstance(details, dict) else {}), **said}
    return Usage(**{name: counts[name] for name in Usage.model_fields if isinstance(counts.get(name), int)})


def _vectors(answer: dict[str, Any], count: int, dimensions: int | None) -> tuple[list[str], int]:
    """Return the vectors in the order of the input, checked: right number, one dimension, finite."""
    try:
        entries = sorted(answer["data"], key=lambda entry: entry.get("index", 0))
        floats = [_floats(entry["embedding"]) for entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MalformedOutput("the MLX server's embeddings are not a list of vectors") from None
    if len(floats) != count:
        raise MalformedOutput(f"the MLX server sent {len(floats)} vectors for {count} inputs")
    expected = dimensions or len(floats[0])
    for vector in floats:
        if len(vector) != expected or not vector:
            raise MalformedOutput(f"the MLX server sent a vector of {len(vector)} instead of {expected} dimensions")
        if not math.isfinite(sum(vector)):
            raise MalformedOutput("the MLX server sent a vector that is not finite")
    return [pack_vector(vector) for vector in floats], expected


def _floats(embedding: Any) -> list[float]:
    if isinstance(embedding, str):
        return unpack_vector(embedding)
    if not isinstance(embedding, list):
        raise TypeError("neither base64 nor a list")
    return embedding
