"""The router: submit a request to its lane, read its reply. The mirror image of `tasks.py`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
import uuid
from functools import partial
from typing import Any, Self, cast, get_args

from kombu import Producer

from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import unavailable
from fleet_worker.broker.topology import (
    ask_exchange,
    cancel_exchange,
    is_node_name,
    registry_queue,
    reply_name,
    transport_of,
)
from fleet_worker.errors import Cancelled, Expired, InvalidRequest
from fleet_worker.protocol.control import ControlMessage
from fleet_worker.protocol.reply import Accepted, Alive, ChatResponse, EmbedResponse, Frame
from fleet_worker.protocol.request import FleetRequest, Operation, Priority
from fleet_worker.registry.view import Registry
from fleet_worker.router.admission import Admission
from fleet_worker.router.attempts import CancelOrphan, OnInterrupt
from fleet_worker.router.call import Call, ChatStream
from fleet_worker.router.cancel_publisher import CancelPublisher
from fleet_worker.router.idempotency import IdempotencyCache
from fleet_worker.router.in_flight import InFlightRequest, Services
from fleet_worker.router.node_selection import NodeSelection
from fleet_worker.router.reply_buffer import ReplyBuffer
from fleet_worker.router.reply_consumer import ReplyConsumer
from fleet_worker.router.scheduler import Scheduler
from fleet_worker.router.submitter import Submitter
from fleet_worker.settings import Settings


class Router:
    """Sends requests into the fleet and receives their replies.

    One router serves any number of threads and asyncio tasks with one reply queue, one inbox thread and no thread per
    request. It connects at the first request, in the process that makes it: after a fork, make another. `close` it, or
    use it as a context manager.

    Every request takes `model` (the public name), `timeout` (seconds in all; `router.timeout` if not given),
    `priority`, `instance` (only on instances of that name), `node` (only on that node), `caller`, `message_context`
    and `trace_context` (JSON objects that travel along), `idempotency_key`, `on_interrupt`; the rest is the body of the
    OpenAI request. All raise `InvalidRequest` before anything is sent, and any other `FleetError` when the reply says
    so; its `metadata["attempts"]` tells where it was tried, as `attempts` of a reply does.

    A request that fails on one node in a way that another may not have is tried there, and a stream goes on where it
    broke off, unless `on_interrupt` is "fail".

    A request with the `idempotency_key` of one that is under way, or was answered in the last `router.idempotency_ttl`
    seconds, gets the same answer, and nothing is generated twice. It has to be the same request: one for another
    operation, model, `instance` or `node`, or with another body or `on_interrupt`, is an `InvalidRequest`. `timeout`
    may differ: it is how long this caller waits, and what it waits for ends at the deadline of the first.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._transport = transport_of(self._settings.broker_url)
        self._app = create_app(self._settings)
        self._submissions = Submitter(self._app, self._transport)
        self._registry = Registry(ask=self._ask_again)
        self._services: Services | None = None
        self._closed = False
        self._process = 0
        """The one that is connected."""
        self._starting = threading.Lock()
        self._connecting: ReplyConsumer | None = None
        self._flights: dict[str, InFlightRequest] = {}
        self._keyed = IdempotencyCache(self._settings.router.idempotency_ttl)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Cancel what is under way, and stop listening for replies. A closed router stays closed."""
        if self._is_of_another_process:  # whose connections these are
            return
        self._closed = True
        if connecting := self._connecting:
            connecting.close()
        with self._starting:
            services, self._services = self._services, None
        for flight in tuple(self._flights.values()):
            flight.give_up(Cancelled("the router was closed"))
        if services:
            services.agenda.close()
            services.notices.close()
            services.inbox.close()
            services.backlog.close()
        self._submissions.close()
        self._app.close()

    @property
    def registry(self) -> Registry:
        """The live view of the fleet. Connects, and takes up to a second if it has not done so yet."""
        self._connected()
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
        on_interrupt: OnInterrupt = options.pop("on_interrupt", "resume")
        if on_interrupt not in get_args(OnInterrupt):
            raise InvalidRequest('on_interrupt is "resume" or "fail"')
        has_key = options.get("idempotency_key") is not None
        request, node = self._request(operation, model, body, **options)
        take_off = partial(self._take_off, request, node, on_interrupt, has_key=has_key)
        return Call(take_off, request.timeout_seconds)

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
        """Build the envelope; it has no reply queue and no deadline until it takes off."""
        limit = self._settings.router.max_timeout
        seconds = self._settings.router.timeout if timeout is None else timeout
        if not isinstance(seconds, int | float) or not 0 < seconds <= limit:
            raise InvalidRequest(f"timeout must be more than 0 and at most {limit:g} seconds (router.max_timeout)")
        if node is not None and not is_node_name(node):
            raise InvalidRequest('node is the name of a node, as in "local@mini-7"')
        request_id = str(uuid.uuid4())
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
            "params": {**body, **params},
            "reply_to": reply_name("unsent", 1),
            "message_context": message_context or {},
            "caller": caller or {},
            "trace_context": trace_context or {},
            "signed_token": None,
            "timeout_seconds": float(seconds),
            "expires_at": time.time() + seconds,
            "priority": priority,
        }
        request = FleetRequest.build(envelope)
        request.check_size(self._settings.max_body_bytes)
        return request, node

    def _take_off(
        self, request: FleetRequest, node: str | None, on_interrupt: OnInterrupt, deadline: float, *, has_key: bool
    ) -> tuple[InFlightRequest, ReplyBuffer]:
        """Submit a request, or join the one that has its key, as a further reader of that."""
        services = self._connected(deadline)
        if has_key and (joined := self._keyed.join(request, node, on_interrupt)):
            return joined
        self._registry.check(request.model, request.operation, request.provider_instance, node)
        left = deadline - time.monotonic()
        flight = InFlightRequest(
            request.addressed_to(services.inbox.name, left), node, services, on_interrupt=on_interrupt
        )
        services.backlog.admit(flight.lane)
        mailbox = flight.join(left)
        if has_key and (joined := self._keyed.add(flight, node, on_interrupt)):
            return joined
        self._flights[request.request_id] = flight
        if self._services is services:
            flight.submit()
        else:  # it was given up with the others, or came too late for that
            flight.give_up(Cancelled("the router was closed"))
        return flight, cast(ReplyBuffer, mailbox)

    @property
    def _is_of_another_process(self) -> bool:
        """Was it connected before a fork? Then its threads are not here, and its sockets not ours."""
        return self._services is not None and self._process != os.getpid()

    def _connected(self, deadline: float = math.inf) -> Services:
        if self._is_of_another_process:
            raise RuntimeError("this router was connected before the process was forked: make one in each process")
        began = time.monotonic()
        patience = max(0.0, min(self._settings.router.connect_timeout, deadline - began))
        # One connects, the others wait for that, and none of them for longer than one would.
        if not self._starting.acquire(timeout=patience):
            said = f"did not answer within {patience:.3g} s"
            raise unavailable(self._settings.broker_url, said, "no answer", retryable=True)
        try:
            if self._closed:
                raise RuntimeError("this router is closed")
            if self._services is None:
                self._services = self._connect(patience, waited=time.monotonic() - began)
                self._process = os.getpid()
            return self._services
        finally:
            self._starting.release()

    def _connect(self, patience: float, *, waited: float) -> Services:
        settings = self._settings.router
        inbox = self._connecting = ReplyConsumer(
            self._app.connection_for_read,
            self._settings.broker_url,
            reply_name(self._settings.host, settings.reply_expires),
            self._receive,
            also=(lambda: registry_queue(self._transport), self._registry.receive),
            listening=self._listening,
        )
        try:
            if self._closed:
                raise Cancelled("the router was closed")
            inbox.start(patience, waited=waited)
        finally:
            self._connecting = None
        agenda = Scheduler()
        agenda.start()
        return Services(
            settings=settings,
            agenda=agenda,
            inbox=inbox,
            backlog=Admission(self._app, self._transport, max_waiting=settings.max_waiting),
            notices=CancelPublisher(agenda, self._app.connection_for_write),
            routes=NodeSelection(self._registry),
            publish=self._publish,
            ended=lambda request_id: self._flights.pop(request_id, None),
        )

    def _receive(self, node: str, frame: Frame) -> None:
        """In the thread of the inbox. Who works for nobody is told so, with each sign of life until it has heard."""
        flight = self._flights.get(frame.id)
        wanted = flight is not None and flight.receive(node, frame)
        if not wanted and self._services and isinstance(frame, Accepted | Alive):
            self._services.notices.cancel(frame.id, CancelOrphan(node, frame.attempt))

    def _listening(self, name: str, channel: Any) -> None:
        """Every registry node answers at once, instead of when its next event is due. And if this is not the first
        time, what was on its way when the connection broke comes again: Redis has forgotten it."""
        self._registry.asked()
        Producer(channel, ask_exchange()).publish({}, serializer="json", retry=False)
        if self._services and self._transport == "redis":
            notice = ControlMessage(missed=name).model_dump(mode="json", exclude_none=True)
            Producer(channel, cancel_exchange()).publish(notice, serializer="json", retry=False)

    def _ask_again(self) -> None:
        # Best effort: a connection that was lost is an error of the broker's client library, not always one of kombu's.
        with contextlib.suppress(Exception), self._submissions.producer(timeout=2.0) as producer:
            producer.publish(
                {}, exchange=ask_exchange(), declare=[ask_exchange()], routing_key="", serializer="json", retry=False
            )

    def _publish(self, request: FleetRequest, lane: str, patience: float) -> None:
        """Wait so long for a broker that is away, but not beyond the deadline of the request."""
        if request.remaining <= 0:
            raise Expired("the deadline passed before the request was sent")
        self._submissions.submit(request, lane, patience=min(patience, request.remaining))
