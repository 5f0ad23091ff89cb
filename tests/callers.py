"""A router of a test's own, which tries nothing a second time, and stops to listen when it is told to."""

import time
import uuid

from fleet_worker import Settings
from fleet_worker.broker import presence, replies
from fleet_worker.broker.app import create_app
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import (
    cancel_exchange,
    lane,
    reply_name,
    route_to,
    task_name,
    transport_of,
)
from fleet_worker.protocol.reply import Accepted, ChatResponse, Deltas, Failure, Reply
from fleet_worker.protocol.request import ControlMessage, FleetRequest
from tests.mlx_clients import until


class Caller:
    """`with Caller(broker) as caller`: it listens within the block, or until `leave()`."""

    def __init__(self, broker):
        self._broker = broker
        self._app = create_app(Settings(broker_url=broker.url))
        self._transport = transport_of(broker.url)
        self.name = reply_name("caller", 60)
        self._frames = []
        self._listens = False
        self._link = ReconnectingThread("caller", lambda: self._app.connection_for_read(), self._listen)

    def __enter__(self):
        self._link.start()
        until(lambda: self._listens)
        return self

    def __exit__(self, *_):
        self.leave()
        self._app.close()

    def leave(self):
        """As one that was killed: its queue and what waits for it stay."""
        self._link.close(timeout=5)

    def submit(self, model, text="Hello", *, request_id="", attempt=1, max_tokens=1000, timeout=60.0, **more):
        """Send one attempt, and return its request id."""
        request = FleetRequest.build(
            {
                "protocol_version": 2,
                "request_id": request_id or uuid.uuid4().hex,
                "correlation_id": "c",
                "idempotency_key": "i",
                "attempt": attempt,
                "operation": "stream_chat",
                "provider": "mlx",
                "provider_instance": "any",
                "model": model,
                "params": {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens},
                "reply_to": self.name,
                "message_context": {},
                "caller": {},
                "trace_context": {},
                "signed_token": None,
                "timeout_seconds": timeout,
                "expires_at": time.time() + timeout,
                "priority": "normal",
                **more,
            }
        )
        route = route_to(lane("stream_chat", model), self._transport)
        arguments = {"args": [request.encode()], "task_id": request.request_id, "ignore_result": True}
        self._app.send_task(task_name("stream_chat"), **arguments, **route)
        return request.request_id

    def cancel(self, *requests, node=None):
        """Each with its last attempt that is not wanted."""
        body = ControlMessage(node=node, cancelled=list(requests)).model_dump(mode="json")
        with self._app.connection_for_write() as connection:
            exchange = cancel_exchange()
            connection.Producer(serializer="json").publish(body, exchange=exchange, routing_key="", declare=[exchange])

    def frames(self, request_id, attempt=1):
        return [frame for _, frame in self._frames if (frame.id, frame.attempt) == (request_id, attempt)]

    def node(self, request_id):
        """Who took it, or None."""
        taken = (node for node, frame in self._frames if frame.id == request_id and isinstance(frame, Accepted))
        return next(taken, None)

    def has_begun(self, request_id, attempt=1):
        return any(isinstance(frame, Deltas) for frame in self.frames(request_id, attempt))

    def last(self, request_id, attempt=1, seconds=20.0):
        """The frame that ends the reply."""

        def ends():
            return [frame for frame in self.frames(request_id, attempt) if isinstance(frame, ChatResponse | Failure)]

        until(ends, seconds)
        return ends()[0]

    def begin(self, model, text="Hello", **more):
        """Submit an attempt, and return its request id once it generates."""
        request_id = self.submit(model, text, **more)
        until(lambda: self.has_begun(request_id, more.get("attempt", 1)), 20)
        return request_id

    def _listen(self, connection):
        with connection.channel() as channel:
            receive_all = replies.consume(connection, channel, self.name, self._receive)
            receive_all(0.01)
            presence.appear(channel, self.name)
            while not self._link.closed.is_set():
                presence.stay(channel, self.name)
                self._listens = True
                self._link.works()
                receive_all(0.5)

    def _receive(self, body):
        reply = Reply.decode(body)
        self._frames += [(reply.node, frame) for frame in reply.frames]
