"""The router: submit a request to its lane, read its reply. The mirror image of `tasks.py`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self, cast

from kombu import Producer

from fleet_worker.call import Call
from fleet_worker.celery import create_app
from fleet_worker.errors import Expired, InvalidRequest
from fleet_worker.frames import ChatResponse, Delta, Deltas, EmbedResponse, Frame, join
from fleet_worker.lanes import (
    Priority,
    ask_exchange,
    direct_lane,
    lane,
    registry_queue,
    reply_name,
    transport_of,
)
from fleet_worker.messages import FleetRequest, Operation, validate_params
from fleet_worker.registry import Registry
from fleet_worker.replies import ReplyInbox
from fleet_worker.settings import Settings
from fleet_worker.submission import submit

__all__ = ["ChatStream", "Router"]


class Router:
    """Sends requests into the fleet and receives their replies.

    One router serves any number of threads and asyncio tasks with one reply queue, one inbox thread and no thread per
    request. It connects at the first request; `close` it, or use it as a context manager.

    Every request takes `model` (the public name), `timeout` (seconds in all; `router.timeout` if not given),
    `priority`, `instance` (only on instances of that name), `node` (only on that node), `caller`, `message_context`
    and `trace_context` (JSON objects that travel along), `idempotency_key`; the rest is the body of the OpenAI
    request. All raise `InvalidRequest` before anything is sent, and any other `FleetError` when the reply says so.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._transport = transport_of(self._settings.broker_url)
        self._app = create_app(self._settings)
        self._registry = Registry(ask=self._ask_again)
        self._inbox: ReplyInbox | None = None
        self._starting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Stop listening for replies. Requests that are still waiting fail at their deadline."""
        with self._starting:
            inbox, self._inbox = self._inbox, None
        if inbox:
            inbox.close()
        self._app.close()

    @property
    def registry(self) -> Registry:
        """The live view of the fleet. Connects, and takes up to a second if it has not done so yet."""
        self._listening()
        return self._registry.settle()

    def chat(self, model: str, messages: list[dict[str, Any]], **options: Any) -> ChatResponse:
        """Return the whole answer."""
        with self._call("chat", model, {"messages": messages}, options) as call:
            return cast(ChatResponse, call.result())

    async def achat(self, model: str, messages: list[dict[str, Any]], **options: Any) -> ChatResponse:
        """As `chat`, awaitable."""
        async with self._call("chat", model, {"messages": messages}, options) as call:
            return cast(ChatResponse, await call.aresult())

    def stream_chat(self, model: str, messages: list[dict[str, Any]], **options: Any) -> ChatStream:
        """Return the answer as it is generated: iterate it with `for` or `async for`."""
        return ChatStream(self._call("stream_chat", model, {"messages": messages}, options))

    def embed(self, model: str, input: str | list[str], **options: Any) -> EmbedResponse:  # noqa: A002 - OpenAI's name
        """Return one vector per text, in the order of the texts."""
        with self._call("embed", model, {"input": input}, options) as call:
            return cast(EmbedResponse, call.result())

    async def aembed(self, model: str, input: str | list[str], **options: Any) -> EmbedResponse:  # noqa: A002
        """As `embed`, awaitable."""
        async with self._call("embed", model, {"input": input}, options) as call:
            return cast(EmbedResponse, await call.aresult())

    def _call(self, operation: Operation, model: str, body: dict[str, Any], options: dict[str, Any]) -> Call:
        request, node = self._request(operation, model, body, **options)
        return Call(
            request,
            begin=lambda: self._begin(request, node),
            publish=lambda attempt: self._publish(attempt, node),
            max_attempts=self._settings.router.max_attempts,
        )

    def _request(
        self,
        operation: Operation,
        model: str,
        body: dict[str, Any],
        *,
        timeout: float | None = None,
        priority: Priority = "normal",
        instance: str = "any",
        node: str | None = None,
        idempotency_key: str | None = None,
        caller: dict[str, Any] | None = None,
        message_context: dict[str, Any] | None = None,
        trace_context: dict[str, Any] | None = None,
        **params: Any,
    ) -> tuple[FleetRequest, str | None]:
        """Build the envelope; it has no reply queue and no deadline until it is submitted."""
        limit = self._settings.router.max_timeout
        seconds = self._settings.router.timeout if timeout is None else timeout
        if not isinstance(seconds, int | float) or not 0 < seconds <= limit:
            raise InvalidRequest(f"timeout must be more than 0 and at most {limit:g} seconds (router.max_timeout)")
        request_id = str(uuid.uuid4())
        checked = validate_params(operation, {**body, **params}, max_bytes=self._settings.max_body_bytes)
        envelope = {
            "protocol_version": 2,
            "request_id": request_id,
            "correlation_id": request_id,
            "idempotency_key": idempotency_key or request_id,
            "attempt": 1,
            "operation": operation,
            "provider": "mlx",
            "provider_instance": instance,
            "model": model,
            "params": checked,
            "reply_to": reply_name("unsent", 1),
            "message_context": message_context or {},
            "caller": caller or {},
            "trace_context": trace_context or {},
            "signed_token": None,
            "timeout_seconds": float(seconds),
            "expires_at": time.time() + seconds,
            "priority": priority,
        }
        return FleetRequest.build(envelope), node

    def _begin(self, request: FleetRequest, node: str | None) -> ReplyInbox:
        """Return the inbox, unless nobody offers what is asked for."""
        inbox = self._listening()
        if not node:
            self._registry.check(request.model, request.operation, request.provider_instance)
        return inbox

    def _listening(self) -> ReplyInbox:
        with self._starting:
            if self._inbox is None:
                router = self._settings.router
                name = reply_name(self._settings.host, router.reply_expires)
                inbox = ReplyInbox(
                    self._app.connection_for_read,
                    name,
                    max_buffered=router.max_buffered,
                    also=(lambda: registry_queue(self._transport), self._registry.receive),
                    listening=self._ask_who_is_there,
                )
                inbox.start(router.connect_timeout)
                self._inbox = inbox
            return self._inbox

    def _ask_who_is_there(self, channel: Any) -> None:
        """Every registry node answers at once, instead of when its next event is due."""
        self._registry.asked()
        Producer(channel, ask_exchange()).publish({}, serializer="json", retry=False)

    def _ask_again(self) -> None:
        # Best effort: a connection that was lost is an error of the broker's client library, not always one of kombu's.
        with contextlib.suppress(Exception), self._app.producer_pool.acquire(block=True, timeout=2.0) as producer:
            producer.publish(
                {}, exchange=ask_exchange(), declare=[ask_exchange()], routing_key="", serializer="json", retry=False
            )

    def _publish(self, request: FleetRequest, node: str | None) -> None:
        """Wait for a broker that is away, but not beyond the deadline of the request."""
        if request.remaining <= 0:
            raise Expired("the deadline passed before the request was sent")
        name = direct_lane(node) if node else lane(request.operation, request.model)
        patience = min(self._settings.router.connect_timeout, request.remaining)
        submit(self._app, self._transport, request, name, patience=patience)


class ChatStream:
    """A streamed answer: iterate it for its deltas; then `response` is the whole, as `Router.chat` returns it.

    Works with `with` and `for`, and with `async with` and `async for`. Nothing is sent before it is entered or
    iterated. An error ends it; what arrived before was yielded.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._ready: deque[Delta] = deque()
        self._deltas: list[Delta] = []
        self._response: ChatResponse | None = None

    def __enter__(self) -> Self:
        self._call.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._call.__exit__()

    async def __aenter__(self) -> Self:
        await self._call.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._call.__aexit__()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while not self._ready:
            if self._response is not None:
                raise StopIteration
            self._call.__enter__()
            self._take(self._call.frame())
        return self._ready.popleft()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._ready:
            if self._response is not None:
                raise StopAsyncIteration
            await self._call.__aenter__()
            self._take(await self._call.aframe())
        return self._ready.popleft()

    @property
    def response(self) -> ChatResponse:
        """The whole answer, once the stream has ended."""
        if self._response is None:
            raise RuntimeError("the stream has not ended: iterate it to its end first")
        return self._response

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, Deltas):
            self._deltas += frame.deltas
            self._ready.extend(frame.deltas)
        else:
            self._response = cast(ChatResponse, frame).model_copy(update=join(self._deltas))
