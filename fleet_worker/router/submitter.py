"""Sends to the broker: requests into lanes, and what all hosts are to hear, on connections that threads share."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from functools import partial

from celery import Celery
from celery.utils.threads import bound_open_broker_sockets
from kombu import Connection, Exchange, Producer
from kombu.exceptions import LimitExceeded
from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_exponential, wait_random

from fleet_worker.broker.broker_clock import BrokerClock
from fleet_worker.broker.connection import ANSWER_WITHIN, CLOSE_WITHIN, connect
from fleet_worker.broker.faults import BROKER_ERRORS, is_away, unavailable
from fleet_worker.broker.queue_depth import SUBMITTED_AT
from fleet_worker.broker.topology import Transport, priority, route_to, task_name
from fleet_worker.errors import Cancelled, Expired
from fleet_worker.protocol.prompt_prefixes import HEADER, PromptPrefixes
from fleet_worker.protocol.request import FleetRequest

MAX_CONNECTIONS = 16
IDLE_AFTER = 5.0
"""Seconds after which a connection that no thread uses is closed. To open one takes some milliseconds."""


class Submitter:
    """Safe for any number of threads: each has a connection of its own while it sends. Connections are opened when they
    are needed.

    kombu's pools belong to the whole process, stay open when a router is closed, and never shrink.
    """

    def __init__(self, app: Celery, transport: Transport) -> None:
        self._app = app
        self._transport = transport
        self._closed = False
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._idle: deque[tuple[float, Connection]] = deque()
        """Since when each is idle; the last one is used first."""
        self._lock = threading.Lock()
        self._broker_clock = BrokerClock()

    def submit(
        self, request: FleetRequest, lane: str, *, patience: float, prefixes: PromptPrefixes | None = None
    ) -> None:
        """Send this attempt of a request into a lane. When this returns, the broker has it. `prefixes` tells the node
        the beginnings of its prompt.

        While the broker is away or silent it is tried again, for `patience` seconds in all and not beyond the deadline
        of the request.

        Raises:
            BrokerUnavailable: the broker did not take it in that time (`retryable`), or refused it.
            Cancelled: the router was closed meanwhile.
            Expired: the deadline has passed.
        """
        if request.remaining <= 0:
            raise Expired("the deadline passed before the request was sent")
        patience = min(patience, request.remaining)
        headers = {HEADER: prefixes.encode()} if prefixes else {}
        send = partial(self._send, request, lane, headers, deadline=time.monotonic() + patience, silence=patience / 2)
        attempts = Retrying(
            retry=retry_if_exception(is_away),
            wait=wait_exponential(multiplier=0.05, max=min(1.0, patience / 10)) + wait_random(0, 0.05),
            stop=stop_before_delay(patience),
            reraise=True,
        )
        try:
            attempts(send)
        except BROKER_ERRORS as error:
            # Those of tenacity hold the error, which holds them, and with them the body of the request.
            traceback.clear_frames(error.__traceback__)
            broker = self._app.conf.broker_url
            if is_away(error) or isinstance(error, LimitExceeded):
                said = f"did not take the request within {round(patience, 1):g} s"
                raise unavailable(broker, said, error, retryable=True) from None
            raise unavailable(broker, "refused the request", error) from None

    def broadcast(self, exchange: Exchange, body: bytes, timeout: float = ANSWER_WITHIN) -> None:
        """Publish JSON to all that subscribe to a fanout exchange; raises one of BROKER_ERRORS or `Cancelled`."""
        with self.producer(timeout) as producer:
            publish(producer, exchange, body)

    @contextlib.contextmanager
    def producer(self, timeout: float, *, silence: float = math.inf) -> Iterator[Producer]:
        """Lend a connected producer. Within `timeout` seconds one must become free and be connected; and the broker has
        that long, or `silence` seconds if that is less, for each of its answers.

        After an error the connection is closed: an answer that comes late must not be taken for that to the next
        message. Raises one of BROKER_ERRORS, and `Cancelled` if this was closed.
        """
        deadline = time.monotonic() + timeout
        if not self._slots.acquire(timeout=timeout):
            raise LimitExceeded(MAX_CONNECTIONS)
        try:
            connection = self._take()
            try:
                yield Producer(connect(connection, min(silence, _left(deadline))))
            except BaseException:
                connection.collect()  # without an orderly close, which waits for the broker
                raise
            self._put_back(connection)
        finally:
            self._slots.release()

    def close_idle(self) -> None:
        """Close the connections that were not used for `IDLE_AFTER` seconds."""
        while connection := self._idle_since(time.monotonic() - IDLE_AFTER):
            with contextlib.suppress(Exception):
                bound_open_broker_sockets(connection, CLOSE_WITHIN)
                connection.close()

    def close(self) -> None:
        """Close all connections; those on which something is being sent, when that has ended."""
        self._closed = True
        while connection := self._idle_since(math.inf):
            connection.collect()

    def _take(self) -> Connection:
        with self._lock:
            if self._closed:
                raise Cancelled("the router was closed")
            if self._idle:
                return self._idle.pop()[1]
        return self._app.connection_for_write()

    def _put_back(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append((time.monotonic(), connection))
                return
        connection.collect()

    def _idle_since(self, before: float) -> Connection | None:
        """Take out the connection that has been idle for longest; None if that is not since `before`."""
        with self._lock:
            return self._idle.popleft()[1] if self._idle and self._idle[0][0] <= before else None

    def _send(
        self, request: FleetRequest, lane: str, headers: dict[str, str], *, deadline: float, silence: float
    ) -> None:
        """Send it once; give up if the broker does not answer within `silence` seconds.

        A connection that died while it was idle is noticed before anything is sent. If the broker was lost or silent
        before it confirmed a message, it may have the message all the same, and have it twice when it is sent again.
        That only costs work: the router listens to one node for each attempt and cancels any other.
        """
        # `send_task` would look for a task of this name, for its route and for a parent: a third of all this.
        task = self._app.amqp.as_task_v2(
            request.request_id,
            task_name(request.operation),
            [request.encode()],
            root_id=request.request_id,
            # These are shown in events and in Flower: the lane, never the arguments.
            argsrepr=lane,
            kwargsrepr="",
            ignore_result=True,
        )
        with self.producer(_left(deadline), silence=silence) as producer:
            self._app.amqp.send_task_message(
                producer,
                task_name(request.operation),
                task,
                **route_to(lane, self._transport),
                priority=priority(request.priority, self._transport),
                # From this the age of a lane's oldest request is known without its body being read.
                headers={**headers, SUBMITTED_AT: self._broker_clock.now(producer.channel)},
                retry=False,
            )


def publish(producer: Producer, exchange: Exchange, body: bytes) -> None:
    """Publish JSON to a fanout exchange, which is declared if this connection has not done so yet."""
    json = {"content_type": "application/json", "content_encoding": "utf-8"}
    producer.publish(body, exchange=exchange, routing_key="", declare=[exchange], retry=False, **json)


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())
