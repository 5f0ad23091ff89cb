"""The client of one MLX server: chat, stream_chat, embed, models, health.

It expects what real servers do: streams that end early without an error, errors inside a response with status 200,
error bodies of any shape, model lists with models that are not there. Every failure is raised as a `FleetError`, and no
error text contains anything of a request.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

import httpx
from pydantic_core import to_json
from tenacity import (
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    stop_before_delay,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)

from fleet_worker.errors import (
    ConfigurationError,
    ConnectionFailure,
    FleetError,
    InstanceUnavailable,
    RequestTimeout,
    Unauthorized,
)
from fleet_worker.mlx.activity import ServerActivity
from fleet_worker.mlx.body import read_body
from fleet_worker.mlx.chat_stream import ChatAnswer, ServerStream
from fleet_worker.mlx.chunks import parse_usage
from fleet_worker.mlx.embeddings import Embeddings, answer_of, parse_vectors
from fleet_worker.mlx.enforcement import AnswerStream, EnforcedStream, Rules, read_whole
from fleet_worker.mlx.error_mapping import HTTPX_EXCEPTIONS, error_of_exception, error_of_response
from fleet_worker.mlx.health import MAX_HEALTH_BYTES, MAX_MODELS_BYTES, Health, health_of, model_ids
from fleet_worker.mlx.offering import Offering
from fleet_worker.mlx.profiles import PROFILES, chat_body
from fleet_worker.mlx.reasoning import ReasoningSplitter
from fleet_worker.mlx.resume import ResumedStream, resume_strategies
from fleet_worker.mlx.timeouts import CancelToken, RequestTimer, TimeoutThread
from fleet_worker.mlx.transport import HEADERS, Transport, tls_context, url_of
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.reply import Usage
from fleet_worker.protocol.request import Resume
from fleet_worker.settings import Instance

DEFAULT_URLS = ("http://127.0.0.1:8000", "http://127.0.0.1:8080")

_PATHS = ("/v1/chat/completions", "/v1/embeddings", "/v1/models", "/health")
_CANARY = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.0, "max_tokens": 1}
_MAX_VECTOR_BYTES = 256 * 1024
"""Enough for 8,192 dimensions in JSON."""
_DEATH_CHECK_SECONDS = 0.5
"""How long `has_died` may take."""
_OCCUPIED_FOR = 1.0
"""Seconds; a server notices within 0.9 s that a client has left."""
_RECHECK_AFTER = 0.05
"""Seconds until a server that refused a connection is asked again: it also refuses for a moment when it is busy."""


class MLXClient:
    """The client of one instance. Threads may share it. Every request has a connection of its own.

    Deadlines are time.monotonic() seconds. A request can be cancelled at any time by its `cancel_token`; it then raises
    the error of the token. All errors are `FleetError`s.
    """

    def __init__(
        self, instance: Instance, base_url: str, *, server: str = "openai", transport: httpx.BaseTransport | None = None
    ) -> None:
        self._instance = instance
        self.profile = PROFILES[server]
        url = _checked_url(base_url)
        self._urls = {path: url_of(url, path) for path in _PATHS}
        self._headers = {**HEADERS, **_authorization(instance)}
        self._transport = transport or Transport(tls_context(url, instance.ca))
        self._timeouts = TimeoutThread()
        self.activity = ServerActivity(self._timeouts, self.profile)
        self._canary_runs = False
        self.url = base_url
        self.unreachable = threading.Event()
        """Set by the health monitor while the server refuses connections: requests then fail at the first refusal."""

    def close(self) -> None:
        self._timeouts.close()
        self._transport.close()

    def chat(
        self,
        params: ChatParams,
        offering: Offering,
        *,
        deadline: float,
        cancel_token: CancelToken | None = None,
        first_content: Callable[[], object] = lambda: None,
    ) -> ChatAnswer:
        """Return the complete answer. The server streams it nevertheless: only a stream can be cancelled.

        `first_content` is called when the server has read the prompt."""
        body = chat_body(params, offering, self.profile)
        with self._open_stream(body, self._timer(deadline, cancel_token, first_content), splitter=None) as stream:
            inside = offering.settings.starts_in_reasoning
            return read_whole(stream, Rules.of(params), starts_in_reasoning=inside)

    @contextmanager
    def stream_chat(
        self,
        params: ChatParams,
        offering: Offering,
        *,
        deadline: float,
        cancel_token: CancelToken | None = None,
        first_content: Callable[[], object] = lambda: None,
        resume: Resume | None = None,
    ) -> Iterator[AnswerStream]:
        """Open a stream: iterate over it, then call its `answer()`. Leaving the block ends the generation.

        `first_content` is called when the server has read the prompt, perhaps more than once if it resumes an answer.
        With `resume`, the stream contains only what follows the text that was delivered before.

        Raises:
            UnsupportedParameter: this server cannot do what a parameter asks for.
            StreamInterrupted: what was delivered cannot be continued.
        """
        rules = Rules.of(params)

        def open_stream(body: dict[str, Any], from_start: bool) -> AbstractContextManager[ServerStream]:
            # An answer that is continued in its visible text has finished its reasoning.
            splitter = ReasoningSplitter(starts_inside=from_start and offering.settings.starts_in_reasoning)
            timer = self._timer(deadline, cancel_token, first_content)
            return self._open_stream(body, timer, splitter, from_start=from_start)

        if resume and (resume.content or resume.reasoning):
            strategies = resume_strategies(params, offering, self.profile, resume)
            with closing(ResumedStream(strategies, resume, open_stream, self.has_died)) as resumed:
                yield EnforcedStream(resumed, rules, delivered=resume.content) if rules else resumed
        else:
            with open_stream(chat_body(params, offering, self.profile), True) as stream:
                yield EnforcedStream(stream, rules) if rules else stream

    @contextmanager
    def _open_stream(
        self, body: dict[str, Any], timer: RequestTimer, splitter: ReasoningSplitter | None, *, from_start: bool = True
    ) -> Iterator[ServerStream]:
        with self._response("POST", "/v1/chat/completions", timer, body) as response:
            limits = {"max_tokens": body["max_tokens"], "may_be_empty": not from_start or "stop" in body}
            yield ServerStream(response, timer, self.profile, splitter, **limits)

    def embed(
        self, texts: Sequence[str], offering: Offering, *, deadline: float, cancel_token: CancelToken | None = None
    ) -> Embeddings:
        """Return one vector for each text. The server is asked in batches of `limits.embed_batch` texts."""
        size = self._instance.limits.embed_batch
        encoding = {"encoding_format": "base64"} if self.profile.base64_vectors else {}
        vectors: list[str] = []
        tokens: list[int | None] = []
        dimensions = offering.settings.dimensions
        for start in range(0, len(texts), size):
            batch = list(texts[start : start + size])
            body = {"model": offering.backend, "input": batch, **encoding}
            timer = self._timer(deadline, cancel_token)
            with self._response("POST", "/v1/embeddings", timer, body) as response:
                answer = answer_of(_read(response, timer, (1 + len(batch)) * _MAX_VECTOR_BYTES))
            timer.content_received()
            of_batch, dimensions = parse_vectors(answer, len(batch), dimensions)
            vectors += of_batch
            tokens.append(parse_usage(answer.get("usage")).prompt_tokens)
        total = None if None in tokens else sum(count or 0 for count in tokens)
        return Embeddings(vectors, dimensions or 0, Usage(prompt_tokens=total, total_tokens=total))

    def canary(self, offering: Offering, *, deadline: float, cancel_token: CancelToken | None = None) -> None:
        """Ask for one token, or one vector, to find out whether the server works; raise a `FleetError` if not."""
        self._canary_runs = True
        try:
            if "embed" in offering.capabilities:
                self.embed(["canary"], offering, deadline=deadline, cancel_token=cancel_token)
            else:
                params = ChatParams.model_validate(_CANARY)
                self.chat(params, offering, deadline=deadline, cancel_token=cancel_token)
        finally:
            self._canary_runs = False

    @property
    def may_be_occupied(self) -> bool:
        """Return whether the server may still work on a request that was cut, or on a canary. One that has a single
        slot fails others meanwhile: vllm-mlx's Simple engine answers with an error 500."""
        return self._canary_runs or time.monotonic() - self._timeouts.last_leftover < _OCCUPIED_FOR

    @property
    def last_content(self) -> float:
        """When this server last delivered content (time.monotonic() seconds), or 0."""
        return self._timeouts.last_content

    def models(self) -> list[str]:
        """Return the ids that `GET /v1/models` lists: only a hint (a disk cache, nothing, or one absolute path)."""
        timer = self._timer(time.monotonic() + self._instance.clocks.connect)
        with self._response("GET", "/v1/models", timer) as response:
            return model_ids(_read(response, timer, MAX_MODELS_BYTES))

    def health(self, timeout: float | None = None) -> Health:
        """Ask `/health`, for at most `timeout` seconds (default: `clocks.connect`). A server without it is ready.

        Raises:
            InstanceUnavailable: the server does not accept connections.
            RequestTimeout: no answer in time.
            ConfigurationError: it redirects to another address.
        """
        timer = self._timer(time.monotonic() + (timeout or self._instance.clocks.connect))
        with self._response("GET", "/health", timer, any_status=True) as response:
            if response.is_redirect:
                raise error_of_response(response, timer)
            return health_of(response, _read(response, timer, MAX_HEALTH_BYTES))

    def identify(self) -> Health:
        """As `health`, of a server that is met for the first time: it may be another program.

        Raises:
            InstanceUnavailable: neither `/health` nor `/v1/models` is that of an MLX server.
        """
        health = self.health()
        if not health.is_api:
            try:
                self.models()
            except (RequestTimeout, Unauthorized):
                return health
            except FleetError:
                text = "what answers there is no MLX server: it has neither /health nor /v1/models"
                raise InstanceUnavailable(text) from None
        return health

    def has_died(self) -> bool:
        """Find out within half a second whether the server has died, after the connection to it broke.

        True if it refuses connections, closes them without an answer, or reports that it is not ready. A server that is
        late is only busy.
        """
        deadline = time.monotonic() + _DEATH_CHECK_SECONDS
        for is_last_try in (False, True):
            try:
                return not self.health(timeout=deadline - time.monotonic()).ready
            except (InstanceUnavailable, ConnectionFailure):
                if not is_last_try:
                    time.sleep(_RECHECK_AFTER)
            except FleetError:  # it answers, however badly, or is late
                return False
        return True

    def _timer(
        self,
        deadline: float,
        cancel_token: CancelToken | None = None,
        first_content: Callable[[], object] = lambda: None,
    ) -> RequestTimer:
        return RequestTimer(self._timeouts, self._instance.clocks, deadline, cancel_token, first_content)

    @contextmanager
    def _response(
        self,
        method: str,
        path: str,
        timer: RequestTimer,
        body: dict[str, Any] | None = None,
        *,
        any_status: bool = False,
    ) -> Iterator[httpx.Response]:
        """Send a request and yield its response; leaving the block closes the connection.

        Raises:
            FleetError: there is no response, or (unless `any_status`) its status is not 2xx.
        """
        content = to_json(body) if body else None
        headers = {**self._headers, "content-type": "application/json"} if body else self._headers
        request = httpx.Request(method, self._urls[path], headers=headers, content=content)
        timer.guard.awaits = path
        if body:
            timer.guard.model, timer.guard.size = body["model"], len(content or b"")
        with timer.running():
            try:
                response = self._send(request, timer)
            except HTTPX_EXCEPTIONS as error:
                raise error_of_exception(error, timer) from None
            with closing(response):
                if not (response.is_success or any_status):
                    raise error_of_response(response, timer)
                yield response

    def _send(self, request: httpx.Request, timer: RequestTimer) -> httpx.Response:
        """Return the response once its headers have arrived. Only connecting is tried again, and only for a POST: at
        that point nothing has reached the server. A bad certificate is not asked for again."""
        was_cut = timer.guard.was_cut
        give_up = stop_before_delay(timer.connect_seconds) | stop_when_event_set(self.unreachable)
        for attempt in Retrying(
            retry=retry_if_exception(_may_pass),
            stop=give_up | stop_when_event_set(was_cut) if request.method == "POST" else stop_after_attempt(1),
            wait=wait_exponential(multiplier=0.05, max=1.0) + wait_random(max=0.05),
            sleep=sleep_using_event(was_cut),
            reraise=True,
        ):
            with attempt:
                request.extensions |= {"guard": timer.guard, "timeout": {"connect": timer.connect_timeout}}
                # Not through an httpx.Client: its cookies, redirects, logs and URLs take three times as long as this.
                return self._transport.handle_request(request)
        raise AssertionError("tenacity returns or raises")


def _may_pass(error: BaseException) -> bool:
    is_of_connecting = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    return is_of_connecting and not isinstance(error.__cause__, ssl.SSLCertVerificationError)


def _checked_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
        url.host.encode("idna")  # otherwise httpx raises this for every request
    except (httpx.InvalidURL, UnicodeError):
        raise ConfigurationError("base_url of this instance is not a valid URL") from None
    return url


def _authorization(instance: Instance) -> dict[str, str]:
    key = instance.api_key.get_secret_value() if instance.api_key else ""
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigurationError("api_key of this instance has characters that are not allowed in an HTTP header")
    return {"authorization": f"Bearer {key}"} if key else {}


def _read(response: httpx.Response, timer: RequestTimer, limit: int) -> bytearray:
    try:
        content = read_body(response, limit)
    except HTTPX_EXCEPTIONS as error:
        raise error_of_exception(error, timer) from None
    timer.check()  # where the end of the connection ends a response, a cut looks like a regular end
    return content
