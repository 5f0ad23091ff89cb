"""The router: build a request, submit it to its lane, read its reply. The mirror image of `node/tasks.py`."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, Unpack, cast, overload

from fleet_worker.broker.faults import unavailable
from fleet_worker.protocol.reply import ChatResponse, EmbedResponse
from fleet_worker.protocol.request import Operation
from fleet_worker.registry.view import Registry
from fleet_worker.router.call import Call, ChatStream
from fleet_worker.router.in_flight import InFlightRequest
from fleet_worker.router.options import ChatOptions, EmbedOptions, RequestOptions
from fleet_worker.router.reply_buffer import ReplyBuffer
from fleet_worker.router.session import Session
from fleet_worker.router.submission import Submission
from fleet_worker.settings import Settings

Messages = list[dict[str, Any]]
Body = Mapping[str, Any]
"""The body of an OpenAI chat completion or embedding."""
SUBMIT_THREADS = 8
"""Threads in which the requests of asyncio tasks are sent. Those of asyncio.to_thread may all be busy with other work
of the caller, and sending would keep that from them."""


class Router:
    """Sends requests into the fleet and receives their replies.

    One router serves any number of threads and asyncio tasks, with one reply queue and no thread per request. It
    connects at the first request. A process that was forked after that needs a router of its own. `close` it, or use it
    as a context manager.

    The fields of the OpenAI body are keyword arguments, or all of them are in one mapping, `body`, as a client has sent
    it: `router.chat(body={"model": ..., "messages": [...], ...}, priority="high")`. None of its fields can be an
    option. Its `model` counts if none is given beside it, its `stream` does not. What `openai_fields` does not know is
    dropped from a `body`, and refused as a keyword argument.

    Options of every request, beside the fields of the OpenAI body (see `options`):

    - `timeout`: seconds until the deadline of the whole request; default `router.timeout`.
    - `queue_timeout`: seconds that it may wait until a node takes it, at first and after each interruption; default
      `router.queue_timeout`. Then it ends with `QueueTimeout`, which tells since when nobody is there. Without this
      option it also ends so if no node that could take it is ready or starting for `router.absent_timeout` seconds
      of its wait.
    - `if_absent`: with "refuse" it is refused at once, with `QueueTimeout`, if the owners of all machines that could do
      it need them, or if no node was ready for `router.absent_timeout` seconds; default "wait".
    - `max_wait`: seconds; if it would probably wait longer for a node, it is refused at once, with `FleetSaturated`; or
      with `QueueTimeout`, if no node has been ready for longer. Default `router.max_wait`: no limit.
    - `priority`: "critical", "high", "normal" (the default) or "low".
    - `instance`: only instances of that name; default "any". `node`: only that node, as in "local@mini-7".
    - `session`: a name of the conversation, as `prompt_cache_key` of a body is: its requests go to one node while that
      is no worse. `cache_scope`: only prompts of the same scope count as equal. `keep_warm`: with False the router does
      not keep the prompt, to run it again on a server that lost its cache.
    - `caller`, `message_context`, `trace_context`: JSON objects that travel with the request.
    - `request_id`: a name for the request, up to 128 visible ASCII characters: logs and Flower show it, followed by a
      dot and what makes it unique.
    - `on_interrupt`: if a node fails, another one is tried, and a stream continues where it broke off ("resume", the
      default); with "fail" a stream that has begun ends with the error.
    - `idempotency_key`: while a request with that key is in flight, and for `router.idempotency_ttl` seconds after its
      answer, the same request gets the same answer, and nothing is generated twice. It ends at the deadline of the
      first. A different request (operation, model, `instance`, `node`, body or `on_interrupt`) with that key is an
      `InvalidRequest`.

    All methods raise `InvalidRequest` before anything is sent, and any other `FleetError` as the end of the request.
    `metadata["attempts"]` of an error, and `attempts` of an answer, list the nodes that it was tried on.
    """

    def __init__(self, settings: Settings | None = None, *, patient: bool = True) -> None:
        """`patient`: while the broker is away, connecting is tried again for `router.connect_timeout` seconds."""
        self._settings = settings or Settings()
        self._patient = patient
        self._registry = Registry(ask=self._ask)
        self._session: Session | None = None
        """Being opened, or open; closed if this router is."""
        self._connecting = threading.Lock()
        self._threads = ThreadPoolExecutor(SUBMIT_THREADS, "fleet-submit")
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        closing = ThreadPoolExecutor(1, "fleet-close")  # those that submit may all be waiting for the broker
        await asyncio.get_running_loop().run_in_executor(closing, self.close)
        closing.shutdown(wait=False)

    def close(self) -> None:
        """Cancel all requests in flight and close all connections. A closed router stays closed."""
        if self._is_of_another_process:  # these are its connections, and its threads
            return
        self._closed = True
        if session := self._session:
            session.close()
        self._threads.shutdown(wait=False)

    @property
    def registry(self) -> Registry:
        """The live view of the fleet. The first access connects, and waits up to a second for the registry nodes. What
        it returns never waits for anything, except in its methods `wait_for` and `wait_for_answers`."""
        self._connected()
        return self._registry.wait_for_answers()

    async def connect(self) -> Registry:
        """As `registry`, awaitable: connect before the first request does. Raises `BrokerUnavailable` after
        `router.connect_timeout` seconds, and may then be called again."""
        if self._closed:
            raise RuntimeError("this router is closed")
        connecting = asyncio.get_running_loop().run_in_executor(self._threads, lambda: self.registry)
        return await connecting

    @property
    def broker_away_for(self) -> float | None:
        """Seconds for which the broker has been away: 0 if it is there, None before the first request. After
        `router.connect_timeout` seconds requests fail at once."""
        session = self._session
        return None if session is None else session.replies.away_for

    @overload
    def chat(self, model: str, messages: Messages, **options: Unpack[ChatOptions]) -> ChatResponse: ...
    @overload
    def chat(self, model: str | None = None, *, body: Body, **options: Unpack[RequestOptions]) -> ChatResponse: ...
    def chat(
        self, model: str | None = None, messages: Messages | None = None, *, body: Body | None = None, **options: Any
    ) -> ChatResponse:
        """Return the whole answer."""
        with self._call("chat", model, {"messages": messages}, body, options) as call:
            return cast(ChatResponse, call.frame())

    @overload
    async def achat(self, model: str, messages: Messages, **options: Unpack[ChatOptions]) -> ChatResponse: ...
    @overload
    async def achat(
        self, model: str | None = None, *, body: Body, **options: Unpack[RequestOptions]
    ) -> ChatResponse: ...
    async def achat(
        self, model: str | None = None, messages: Messages | None = None, *, body: Body | None = None, **options: Any
    ) -> ChatResponse:
        """As `chat`, awaitable."""
        async with self._call("chat", model, {"messages": messages}, body, options) as call:
            return cast(ChatResponse, await call.aframe())

    @overload
    def stream_chat(self, model: str, messages: Messages, **options: Unpack[ChatOptions]) -> ChatStream: ...
    @overload
    def stream_chat(self, model: str | None = None, *, body: Body, **options: Unpack[RequestOptions]) -> ChatStream: ...
    def stream_chat(
        self, model: str | None = None, messages: Messages | None = None, *, body: Body | None = None, **options: Any
    ) -> ChatStream:
        """Return a stream to iterate with `for` or `async for`; the request is sent when that begins."""
        return ChatStream(self._call("stream_chat", model, {"messages": messages}, body, options))

    @overload
    def embed(self, model: str, input: str | list[str], **options: Unpack[EmbedOptions]) -> EmbedResponse: ...
    @overload
    def embed(self, model: str | None = None, *, body: Body, **options: Unpack[RequestOptions]) -> EmbedResponse: ...
    def embed(
        self,
        model: str | None = None,
        input: str | list[str] | None = None,
        *,
        body: Body | None = None,
        **options: Any,
    ) -> EmbedResponse:
        """Return one vector per text, in the order of the texts."""
        with self._call("embed", model, {"input": input}, body, options) as call:
            return cast(EmbedResponse, call.frame())

    @overload
    async def aembed(self, model: str, input: str | list[str], **options: Unpack[EmbedOptions]) -> EmbedResponse: ...
    @overload
    async def aembed(
        self, model: str | None = None, *, body: Body, **options: Unpack[RequestOptions]
    ) -> EmbedResponse: ...
    async def aembed(
        self,
        model: str | None = None,
        input: str | list[str] | None = None,
        *,
        body: Body | None = None,
        **options: Any,
    ) -> EmbedResponse:
        """As `embed`, awaitable."""
        async with self._call("embed", model, {"input": input}, body, options) as call:
            return cast(EmbedResponse, await call.aframe())

    def _call(
        self,
        operation: Operation,
        model: str | None,
        arguments: dict[str, Any],
        body: Body | None,
        options: dict[str, Any],
    ) -> Call:
        asked = Submission.of(self._settings, operation, model, arguments, body, options)

        def start(deadline: float) -> tuple[InFlightRequest, ReplyBuffer]:
            return self._connected(deadline).start(asked, deadline)

        def refuse() -> None:
            if (session := self._session) and not self._is_of_another_process:
                session.refuse(asked)

        return Call(start, refuse, asked.request.timeout_seconds, self._threads)

    def _connected(self, deadline: float = math.inf) -> Session:
        """Return the session; open it first if this is the first request. Others that come meanwhile wait for that."""
        if self._is_of_another_process:
            raise RuntimeError("this router was connected before the process was forked: make one in each process")
        session, began = self._session, time.monotonic()
        if session and session.is_open and not self._closed:
            return session
        patience = max(0.0, min(self._settings.router.connect_timeout, deadline - began))
        if session and not session.is_closed:
            began -= patience - session.require_broker(patience)
        if not self._connecting.acquire(timeout=max(0.0, began + patience - time.monotonic())):
            said = f"did not answer within {round(patience, 1):g} s"
            raise unavailable(self._settings.broker_url, said, "no answer", retryable=True)
        try:
            return self._open(patience, began)
        finally:
            self._connecting.release()

    def _open(self, patience: float, began: float) -> Session:
        """Open the session, for one thread at a time. One that the broker has not answered yet goes on trying."""
        session = self._session
        if session and (session.is_closed or session.replies.has_given_up):
            session.close()
            session = None
        session = self._session = session or Session(self._settings, self._registry)
        if self._closed:  # only now: `close` has seen the session, or is seen here
            raise RuntimeError("this router is closed")
        if not session.is_open:
            session.open(patience, waited=time.monotonic() - began, patient=self._patient)
        return session

    @property
    def _is_of_another_process(self) -> bool:
        session = self._session
        return session is not None and session.process != os.getpid()

    def _ask(self) -> None:
        if session := self._session:
            session.ask()
