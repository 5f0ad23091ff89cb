"""Everything that a connected router holds: its connections, its threads and the requests in flight."""

from __future__ import annotations

import contextlib
import math
import os
import time
from functools import partial
from typing import cast

from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import ask_exchange, direct_lane, lane, reply_name, transport_of
from fleet_worker.errors import BrokerUnavailable, Cancelled, FleetSaturated
from fleet_worker.protocol.registry_event import WHOLE_STATUS
from fleet_worker.protocol.reply import Accepted, Alive, Frame, LastFrame
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.registry.view import Registry
from fleet_worker.router import context_length
from fleet_worker.router.admission import Admission
from fleet_worker.router.control_publisher import ControlPublisher
from fleet_worker.router.effects import CancelOrphan
from fleet_worker.router.idempotency import IdempotencyCache
from fleet_worker.router.in_flight import InFlightRequest
from fleet_worker.router.node_selection import NodeSelection
from fleet_worker.router.prompt_caches import PromptCaches
from fleet_worker.router.queue_wait import Place
from fleet_worker.router.reply_buffer import ReplyBuffer
from fleet_worker.router.reply_consumer import ReplyConsumer
from fleet_worker.router.route import Route
from fleet_worker.router.scheduler import Scheduler
from fleet_worker.router.submission import Submission
from fleet_worker.router.submitter import IDLE_AFTER, Submitter
from fleet_worker.settings import Settings

SHORT = 1_000
"""Characters of messages that fit into any context window: for these it is not looked up."""


class Session:
    """Belongs to the process that made it. It is opened once; once it is closed it stays closed."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.settings = settings.router
        self.process = os.getpid()
        self._app = create_app(settings)
        self._registry = registry
        self.nodes = NodeSelection(registry)
        self.scheduler = Scheduler()
        transport = transport_of(settings.broker_url)
        self.submitter = Submitter(self._app, transport)
        self.admission = Admission(self.submitter.producer, transport, max_waiting=self.settings.max_waiting)
        name = reply_name(settings.host, self.settings.reply_expires)
        self.control = ControlPublisher(name, self.submitter, self.scheduler)
        self.replies = ReplyConsumer(
            self._app.connection_for_read,
            settings.broker_url,
            name,
            self.receive,
            registry,
            in_flight=lambda: len(self._requests),
        )
        self._prompt_caches = self._make_prompt_caches(settings) if self.settings.affinity else None
        self._requests: dict[str, InFlightRequest] = {}
        self._answers = IdempotencyCache(self.settings.idempotency_ttl)
        self.is_open = False
        self.is_closed = False

    def open(self, timeout: float, *, waited: float = 0.0, patient: bool = True) -> None:
        """Consume the reply queue, from now on; raises what `ReplyConsumer.start` raises. If the broker only did not
        answer in that time, this may be called again."""
        try:
            self.replies.start(timeout, waited=waited, patient=patient)
        except BrokerUnavailable:
            if self.replies.has_given_up:
                self.close()
            raise
        except BaseException:
            self.close()
            raise
        self.scheduler.start()
        self._close_idle()
        if self._prompt_caches:
            self._prompt_caches.start()
        self.is_open = True

    def close(self) -> None:
        """Cancel all requests in flight, delete the reply queue, and close all connections."""
        self.is_closed = True
        if self._prompt_caches:
            self._prompt_caches.close()
        for request in tuple(self._requests.values()):
            request.give_up(Cancelled("the router was closed"))
        self.scheduler.close()  # after the cancels were published
        self.replies.close()
        self.submitter.close()
        self._app.close()

    def refuse(self, asked: Submission) -> None:
        """Raise the error of a request that `start` would refuse, if that is certain without waiting for anything."""
        request = asked.request
        if request.idempotency_key != request.request_id:  # it may be answered already
            return
        self.require_broker(math.inf)
        if self.is_open and (asked.node or request.provider_instance == "any"):
            name = direct_lane(asked.node) if asked.node else lane(request.operation, request.model)
            self.admission.refuse(name, request.priority, asked.max_wait)

    def require_broker(self, patience: float) -> float:
        """Return how many of `patience` seconds a request may wait for the broker. It has `connect_timeout` to come
        back, counted from when it was first missed; after that this raises `BrokerUnavailable`."""
        return min(patience, self.replies.require_broker(self.settings.connect_timeout))

    def start(self, asked: Submission, deadline: float) -> tuple[InFlightRequest, ReplyBuffer]:
        """Submit a request, or join the one in flight, or answered, that has its idempotency key. Return it with a
        buffer of its reader's own.

        Raises:
            FleetError: it is refused (`ModelUnavailable`, `UnsupportedParameter`, `ContextLengthExceeded`,
                `QueueTimeout` for `max_wait` and `if_absent`, `FleetSaturated`, `InvalidRequest` for a key of a
                different request), or the broker did not take it.
        """
        request, node, on_interrupt = asked.request, asked.node, asked.on_interrupt
        has_key = request.idempotency_key != request.request_id
        if has_key and (joined := self._answers.join(request, node, on_interrupt)):
            return joined
        patience = self.require_broker(deadline - time.monotonic())
        self._require_possible(asked)
        if self._prompt_caches:
            self._prompt_caches.wait_until_known(asked, deadline)
        left = deadline - time.monotonic()
        request = request.addressed_to(self.replies.name, left)
        route = self._route(asked, request)
        waits = {"queue_timeout": asked.queue_timeout, "absent_timeout": asked.absent_timeout}
        started = InFlightRequest(request, route, self, on_interrupt=on_interrupt, **waits)
        started.place = self._admit(request, route, asked.max_wait)
        buffer = cast(ReplyBuffer, started.join(left))  # it cannot have failed yet
        if has_key and (joined := self._answers.add(started, node, on_interrupt)):
            started.place.ended(time.monotonic())
            return joined
        self._requests[request.request_id] = started
        if self._prompt_caches and route.prefixes and asked.cache.keep_warm:
            self._prompt_caches.asked(request, route.prefixes)
        if self.is_closed:  # it came too late to be cancelled with the others
            started.give_up(Cancelled("the router was closed"))
        started.submit(patience)
        return started, buffer

    def _route(self, asked: Submission, request: FleetRequest) -> Route:
        caches = self._prompt_caches
        if caches is None:
            return Route(request, asked.node, self.nodes)
        return Route(request, asked.node, self.nodes, caches.affinity, caches.prefixes(asked))

    def _admit(self, request: FleetRequest, route: Route, max_wait: float | None) -> Place:
        """Count a request in its lane; in the shared one if the direct lane of the chosen node is too full or slow."""
        try:
            if max_wait is None or route.expected_wait <= max_wait:
                return self._admit_to(request, route, max_wait)
            route.leave()
        except FleetSaturated:
            if not route.leave():
                raise
        route.choose(request)
        return self._admit_to(request, route, max_wait)

    def _admit_to(self, request: FleetRequest, route: Route, max_wait: float | None) -> Place:
        fits = request.model, request.operation, request.provider_instance, route.node
        # The function is kept for as long as the lane is known: without the request, and its prompt.
        slots = partial(self.nodes.slots, *fits)
        shared = lane(request.operation, request.model) if route.node else None
        return self.admission.admit(
            route.lane(request), request.priority, max_wait=max_wait, count_slots=slots, beside=shared
        )

    def _require_possible(self, asked: Submission) -> None:
        """Raise why no node can do what this asks for, or none is expected soon enough."""
        request, node = asked.request, asked.node
        self._registry.require_offered(request.model, request.operation, request.provider_instance, node)
        self.nodes.require_able(request, node)
        if context_length.characters(request) > SHORT:
            context_length.require_fits(request, self.nodes.context_window(request, node))
        self.nodes.require_soon(request, node, asked.max_wait)
        if asked.if_absent == "refuse":
            self.nodes.require_there(request, node, asked.absent_timeout)

    def ended(self, request_id: str, last: LastFrame) -> None:
        """Forget a request that has ended with this frame."""
        self._requests.pop(request_id, None)
        if self._prompt_caches:
            self._prompt_caches.ended(request_id, last)

    def receive(self, node: str, frame: Frame) -> None:
        """Hand a frame to its request.

        If a node reports progress on a request that no caller waits for, send a cancel. Repeat on every heartbeat: an
        earlier cancel may have been lost.
        """
        receiver = self._requests.get(frame.id) or self._prompt_caches
        wanted = receiver is not None and receiver.receive(node, frame)
        if not wanted and isinstance(frame, Accepted | Alive):
            self.control.tell(frame.id, CancelOrphan(node, frame.attempt))

    def ask(self) -> None:
        """Ask all registry nodes for their state. Best effort."""
        # A connection that was lost is an error of the broker's client library, not always one of kombu's.
        with contextlib.suppress(Exception):
            self.submitter.broadcast(ask_exchange(), WHOLE_STATUS, timeout=2.0)

    def _make_prompt_caches(self, settings: Settings) -> PromptCaches:
        return PromptCaches(
            settings,
            self._registry,
            self._app.connection_for_read,
            self.nodes.ready,
            self.replies.name,
            self.submitter,
            self.control,
            self.scheduler,
        )

    def _close_idle(self) -> None:
        self.scheduler.at(time.monotonic() + IDLE_AFTER, self._close_idle)
        self.submitter.close_idle()
