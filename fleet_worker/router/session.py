"""Everything that a connected router holds: its connections, its threads and the requests in flight."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Collection
from typing import cast

from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import ask_exchange, reply_name, transport_of
from fleet_worker.errors import Cancelled
from fleet_worker.protocol.reply import Accepted, Alive, Frame
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.registry.view import Registry
from fleet_worker.router.admission import Admission
from fleet_worker.router.attempts import CancelOrphan, OnInterrupt
from fleet_worker.router.call import ReplyBuffer
from fleet_worker.router.idempotency import IdempotencyCache
from fleet_worker.router.in_flight import InFlightRequest
from fleet_worker.router.reply_consumer import ReplyConsumer
from fleet_worker.router.scheduler import Scheduler
from fleet_worker.router.submitter import IDLE_AFTER, CancelPublisher, Submitter
from fleet_worker.settings import Settings


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
        self.cancels = CancelPublisher(self.submitter, self.scheduler)
        self.replies = ReplyConsumer(
            self._app.connection_for_read,
            settings.broker_url,
            reply_name(settings.host, self.settings.reply_expires),
            self.receive,
            registry,
        )
        self._requests: dict[str, InFlightRequest] = {}
        self._cache = IdempotencyCache(self.settings.idempotency_ttl)
        self.is_open = False
        self._closed = False

    def open(self, timeout: float, *, waited: float = 0.0) -> None:
        """Consume the reply queue, from now on; raises what `ReplyConsumer.start` raises."""
        try:
            self.replies.start(timeout, waited=waited)
        except BaseException:
            self.close()
            raise
        self.scheduler.start()
        self._close_idle()
        self.is_open = True

    def close(self) -> None:
        """Cancel all requests in flight, delete the reply queue, and close all connections."""
        self._closed = True
        for request in tuple(self._requests.values()):
            request.give_up(Cancelled("the router was closed"))
        self.scheduler.close()  # after the cancels were published
        self.replies.close()
        self.submitter.close()
        self._app.close()

    def start(
        self, request: FleetRequest, node: str | None, on_interrupt: OnInterrupt, deadline: float
    ) -> tuple[InFlightRequest, ReplyBuffer]:
        """Submit a request, or join the one in flight, or answered, that has its idempotency key. Return it with a
        buffer of its reader's own.

        Raises:
            FleetError: it is refused (`ModelUnavailable`, `FleetSaturated`, `InvalidRequest` for a key of a different
                request), or the broker did not take it.
        """
        has_key = request.idempotency_key != request.request_id
        if has_key and (joined := self._cache.join(request, node, on_interrupt)):
            return joined
        self._registry.require_offered(request.model, request.operation, request.provider_instance, node)
        left = deadline - time.monotonic()
        request = request.addressed_to(self.replies.name, left)
        started = InFlightRequest(request, node, self, on_interrupt=on_interrupt)
        self.admission.admit(started.lane)
        buffer = cast(ReplyBuffer, started.join(left))  # it cannot have failed yet
        if has_key and (joined := self._cache.add(started, node, on_interrupt)):
            return joined
        self._requests[request.request_id] = started
        if self._closed:  # it came too late to be cancelled with the others
            started.give_up(Cancelled("the router was closed"))
        started.submit()
        return started, buffer

    def ended(self, request_id: str) -> None:
        """This request needs no more frames."""
        self._requests.pop(request_id, None)

    def receive(self, node: str, frame: Frame) -> None:
        """Hand a frame to its request.

        If a node reports progress on a request that no caller waits for, send a cancel. Repeat on every heartbeat: an
        earlier cancel may have been lost.
        """
        request = self._requests.get(frame.id)
        wanted = request is not None and request.receive(node, frame)
        if not wanted and isinstance(frame, Accepted | Alive):
            self.cancels.cancel(frame.id, CancelOrphan(node, frame.attempt))

    def ask(self) -> None:
        """Ask all registry nodes for their state. Best effort."""
        # A connection that was lost is an error of the broker's client library, not always one of kombu's.
        with contextlib.suppress(Exception):
            self.submitter.broadcast(ask_exchange(), b"{}", timeout=2.0)

    def _close_idle(self) -> None:
        self.scheduler.at(time.monotonic() + IDLE_AFTER, self._close_idle)
        self.submitter.close_idle()


class NodeSelection:
    """Chooses where an attempt goes, by the present view of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def node_for(self, request: FleetRequest, failed: Collection[str] = ()) -> str | None:
        """Return None to use the shared lane (the default).

        Return a node if the caller asked for an instance, or if a node that failed this request (`failed`) also
        consumes the lane. Choose at random, weighted by slots. If no other node is ready, use the lane all the same;
        but a request for an instance waits for a node of that instance.
        """
        wanted = request.provider_instance
        if wanted == "any":
            ready = self._nodes(request, ready=True) if failed else {}
            return _choose(ready.keys() - failed, ready)
        nodes = self._nodes(request)
        candidates = {node for node, (instance, _) in nodes.items() if instance == wanted}
        ready_ones = candidates & self._nodes(request, ready=True).keys()
        return _choose((ready_ones - set(failed)) or ready_ones or candidates, nodes)

    def waits_in_vain(self, request: FleetRequest, node: str) -> bool:
        """Return whether this node is not ready, while another node could take the request."""
        ready, wanted = self._nodes(request, ready=True), request.provider_instance
        return node not in ready and (wanted == "any" or any(wanted == instance for instance, _ in ready.values()))

    def _nodes(self, request: FleetRequest, ready: bool | None = None) -> dict[str, tuple[str, int]]:
        """Return instance and slots of each node that consumes the lane of this request, now or when it is ready."""
        offered = self._registry.offerings(model=request.model, capability=request.operation, ready=ready)
        return {each.node: (each.instance.name, each.instance.slots or 1) for each in offered}


def _choose(candidates: Collection[str], nodes: dict[str, tuple[str, int]]) -> str | None:
    """Return one of the candidates; None if there is none, or if every node is one."""
    if not candidates or len(candidates) == len(nodes):
        return None
    return random.choices(list(candidates), [nodes[node][1] for node in candidates])[0]  # noqa: S311 - not a secret
