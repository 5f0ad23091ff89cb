"""The client of one MLX server: chat, stream_chat, embed, models, health.

It expects what real servers do: streams that end without a word, errors inside a 200, any error shape, models that
are listed and not there. Everything foreign becomes one of our errors, and nothing of a request is in their texts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic_core import from_json, to_json
from tenacity import (
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_before_delay,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)

from fleet_worker.errors import ConfigurationError, FleetError, MalformedOutput, RequestTimeout
from fleet_worker.mlx.chat_stream import ChatAnswer, ServerStream
from fleet_worker.mlx.chunks import usage_of
from fleet_worker.mlx.embeddings import vectors_of
from fleet_worker.mlx.error_mapping import foreign_errors_mapped, raise_for_status, raw
from fleet_worker.mlx.offering import Offering
from fleet_worker.mlx.profiles import PROFILES, chat_body, kind_of
from fleet_worker.mlx.reasoning import ReasoningSplitter, split_reasoning
from fleet_worker.mlx.resume import Continuation, ResumeStrategy, ways
from fleet_worker.mlx.timeouts import CancelToken, RequestTimer, TimeoutThread
from fleet_worker.mlx.transport import Transport
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.reply import Usage, join
from fleet_worker.protocol.request import Resume
from fleet_worker.settings import Instance

_CANARY = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.0}
_DEAD_WITHIN = 0.5
"""Seconds to find out whether a server has died."""
_LOOKS_AGAIN = 0.05
"""Seconds until that is asked a second time: a server with a full backlog refuses for a moment."""
DEFAULT_URLS = ("http://127.0.0.1:8000", "http://127.0.0.1:8080")


@dataclass(frozen=True, slots=True)
class Health:
    """What `GET /health` says: not the truth, real servers say 200 with a dead generation thread."""

    ready: bool
    server: str
    engine: str | None = None
    """What vllm-mlx calls its engine: a "simple" one has a single slot."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors as they travel: base64 of little-endian float32, in the order of the input."""

    data: list[str]
    dimensions: int
    usage: Usage


class MLXClient:
    """The client of one instance; safe to share between threads. Every request has a connection of its own.

    A `deadline` is monotonic seconds. A `stop` ends a request at any moment, and the method raises the error that it
    was stopped with. Every method raises `FleetError`s only.
    """

    def __init__(
        self, instance: Instance, base_url: str, *, server: str = "openai", transport: httpx.BaseTransport | None = None
    ) -> None:
        self._instance = instance
        self._quirks = PROFILES[server]
        url = _url(base_url)
        self._http = httpx.Client(
            base_url=url,
            headers={"accept-encoding": "identity", "connection": "close", **_authorization(instance)},
            transport=transport or Transport(secure=url.scheme == "https"),
            trust_env=False,
        )
        self._watchdog = TimeoutThread()
        self.url = base_url
        self.unreachable = threading.Event()
        """Set by whoever watches the server while nothing listens there: connecting is then not tried again."""

    def close(self) -> None:
        self._watchdog.close()
        self._http.close()

    def chat(
        self, params: ChatParams, offering: Offering, *, deadline: float, cancel_token: CancelToken | None = None
    ) -> ChatAnswer:
        """Return the whole answer. The server streams all the same: only a stream can be stopped."""
        body = chat_body(params, offering, self._quirks)
        with self._stream(body, self._clock(deadline, cancel_token), splitter=None) as stream:
            whole = join(delta for deltas in stream for delta in deltas)
        if whole["content"] and not whole["reasoning"]:
            inside = offering.settings.starts_in_reasoning
            visible, reasoning = split_reasoning(whole["content"], starts_inside=inside)
            whole |= {"content": visible or None, "reasoning": reasoning or None}
        return stream.answer(**whole)

    @contextmanager
    def stream_chat(
        self,
        params: ChatParams,
        offering: Offering,
        *,
        deadline: float,
        cancel_token: CancelToken | None = None,
        resume: Resume | None = None,
    ) -> Iterator[ServerStream | Continuation]:
        """Open a stream; iterate it, then ask for its `answer()`. Leaving the block stops the server.

        With `resume` it is only what comes after what was delivered, by the ways of `continuation.ways`.

        Raises:
            StreamInterrupted: there is no way to go on with what was delivered.
        """
        if resume and (resume.content or resume.reasoning):
            with closing(self._continuation(params, offering, deadline, cancel_token, resume)) as continuation:
                yield continuation
            return
        splitter = ReasoningSplitter(starts_inside=offering.settings.starts_in_reasoning)
        body = chat_body(params, offering, self._quirks)
        with self._stream(body, self._clock(deadline, cancel_token), splitter=splitter) as stream:
            yield stream

    def _continuation(
        self, params: ChatParams, offering: Offering, deadline: float, cancel_token: CancelToken | None, resume: Resume
    ) -> Continuation:
        def ask(way: ResumeStrategy) -> AbstractContextManager[ServerStream]:
            # Who goes on with visible text has thought before.
            inside = offering.settings.starts_in_reasoning and way.replays
            return self._stream(
                way.body, self._clock(deadline, cancel_token), splitter=ReasoningSplitter(starts_inside=inside)
            )

        return Continuation(ways(params, offering, self._quirks, resume), resume, ask)

    @contextmanager
    def _stream(
        self, body: dict[str, Any], clock: RequestTimer, *, splitter: ReasoningSplitter | None
    ) -> Iterator[ServerStream]:
        with self._response("POST", "/v1/chat/completions", clock, body) as response:
            raise_for_status(response, clock)
            yield ServerStream(response, clock, self._quirks, splitter, max_tokens=body["max_tokens"])

    def embed(
        self, texts: Sequence[str], offering: Offering, *, deadline: float, cancel_token: CancelToken | None = None
    ) -> Embeddings:
        """Return one vector per text, asking the server in batches that it can take."""
        size = self._instance.limits.embed_batch
        data: list[str] = []
        tokens: list[int | None] = []
        dimensions = offering.settings.dimensions
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            answer = self._embed_batch(batch, offering, self._clock(deadline, cancel_token))
            vectors, dimensions = vectors_of(answer, len(batch), dimensions)
            data += vectors
            tokens.append(usage_of(answer.get("usage")).prompt_tokens)
        total = None if None in tokens else sum(count or 0 for count in tokens)
        return Embeddings(data, dimensions or 0, Usage(prompt_tokens=total, total_tokens=total))

    def _embed_batch(self, texts: Sequence[str], offering: Offering, clock: RequestTimer) -> dict[str, Any]:
        body = {"model": offering.backend, "input": list(texts)}
        if self._quirks.base64_vectors:
            body["encoding_format"] = "base64"
        with self._response("POST", "/v1/embeddings", clock, body) as response:
            raise_for_status(response, clock)
            answer = _object(_read(response, clock))
        clock.content()
        return answer

    def canary(self, offering: Offering, *, deadline: float, cancel_token: CancelToken | None = None) -> None:
        """Ask for one token, or one vector; raises a `FleetError` unless the server works."""
        if "embed" in offering.capabilities:
            self.embed(["canary"], offering, deadline=deadline, cancel_token=cancel_token)
            return
        tokens = 1 + (self._quirks.hides_length or 0)  # mlx-omni-server drops the last one
        params = ChatParams.model_validate({**_CANARY, "max_tokens": tokens})
        self.chat(params, offering, deadline=deadline, cancel_token=cancel_token)

    def models(self) -> list[str]:
        """Return the ids that `GET /v1/models` reports: a hint (a disk cache, an empty body, or one absolute path)."""
        clock = self._clock(time.monotonic() + self._instance.clocks.connect)
        with self._response("GET", "/v1/models", clock) as response:
            raise_for_status(response, clock)
            content = _read(response, clock)
        if not content:  # mlx_lm.server without a model cache on disk
            return []
        listed = _object(content).get("data")
        if not isinstance(listed, list):
            raise MalformedOutput("the MLX server's list of models is not one")
        return [entry["id"] for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    @property
    def last_content(self) -> float:
        """When this server last delivered anything that was asked for, or 0."""
        return self._watchdog.last_content

    def health(self, timeout: float | None = None) -> Health:
        """Ask `/health`; a server without it is ready if it answers at all. Without a timeout `clocks.connect` counts.

        Raises:
            InstanceUnavailable: nothing listens there.
            RequestTimeout: no answer within `timeout` seconds.
        """
        clock = self._clock(time.monotonic() + (timeout or self._instance.clocks.connect))
        with self._response("GET", "/health", clock) as response:
            content = _read(response, clock)
        try:
            said = from_json(content)
        except ValueError:
            said = None
        server = kind_of(response.http_version, response.headers, said)
        if response.status_code == 404:
            return Health(ready=True, server=server)
        known = said if isinstance(said, dict) else {}
        sick = known.get("status") in ("unhealthy", "unavailable", "loading", "error")
        engine = known.get("engine_type")
        return Health(response.is_success and not sick, server, engine if isinstance(engine, str) else None)

    def has_died(self) -> bool:
        """Find out, within half a second, whether the server died: to be asked when the connection to it broke.

        Dead is one that refuses connections, hangs up, or says that it is not ready. One that is late is busy.
        """
        ends = time.monotonic() + _DEAD_WITHIN
        for last in (False, True):
            try:
                return not self.health(timeout=ends - time.monotonic()).ready
            except RequestTimeout:
                return False
            except FleetError:
                if not last:
                    time.sleep(_LOOKS_AGAIN)
        return True

    def _clock(self, deadline: float, cancel_token: CancelToken | None = None) -> RequestTimer:
        return RequestTimer(self._watchdog, self._instance.clocks, deadline, cancel_token)

    @contextmanager
    def _response(
        self, method: str, path: str, clock: RequestTimer, body: dict[str, Any] | None = None
    ) -> Iterator[httpx.Response]:
        """Open the response to a request; leaving the block closes the connection."""
        request = self._http.build_request(
            method,
            path,
            content=None if body is None else to_json(body),
            headers={"content-type": "application/json"} if body else None,
        )
        with clock.running():
            with foreign_errors_mapped(clock):
                response = self._send(request, clock)
            with closing(response):
                yield response

    def _send(self, request: httpx.Request, clock: RequestTimer) -> httpx.Response:
        """Return the response once its head is there.

        Only connecting is tried again: nothing has reached the server before. A mere question is not even that.
        """
        patience = stop_before_delay(clock.connecting) | stop_when_event_set(self.unreachable)
        over = clock.guard.over
        for attempt in Retrying(
            retry=retry_if_exception_type((httpx.ConnectError, httpx.ConnectTimeout)),
            stop=patience | stop_when_event_set(over) if request.method == "POST" else stop_after_attempt(1),
            wait=wait_exponential(multiplier=0.05, max=1.0) + wait_random(max=0.05),
            sleep=sleep_using_event(over),
            reraise=True,
        ):
            with attempt:
                request.extensions |= {"guard": clock.guard, "timeout": {"connect": clock.connect_timeout}}
                return self._http.send(request, stream=True)
        raise AssertionError("tenacity returns or raises")


def _url(base_url: str) -> httpx.URL:
    with foreign_errors_mapped():
        url = httpx.URL(base_url)
    try:
        url.host.encode("idna")
    except UnicodeError:  # with httpx it would be one of every request
        raise ConfigurationError("base_url of this instance names a host that cannot be one") from None
    return url


def _authorization(instance: Instance) -> dict[str, str]:
    key = instance.api_key.get_secret_value() if instance.api_key else ""
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigurationError("api_key of this instance has characters that an HTTP header cannot carry")
    return {"authorization": f"Bearer {key}"} if key else {}


def _read(response: httpx.Response, clock: RequestTimer) -> bytes:
    with foreign_errors_mapped(clock):
        content = b"".join(raw(response))
    clock.check()  # where the end of a response is the end of its connection, a cut looks like an end
    return content


def _object(content: bytes) -> dict[str, Any]:
    try:
        parsed = from_json(content)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise MalformedOutput("the MLX server sent something that is not a JSON object")
    return parsed
