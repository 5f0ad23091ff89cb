"""Requests into their lanes, also when the broker is away for a moment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from celery import Celery
from kombu import Producer
from kombu.exceptions import LimitExceeded
from kombu.pools import ProducerPool
from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_exponential, wait_random

from fleet_worker.broker.connection import BROKER_ERRORS, connect, is_away, unavailable
from fleet_worker.broker.queue_depth import SUBMITTED_AT
from fleet_worker.broker.topology import Transport, priority, route_to, task_name
from fleet_worker.errors import Cancelled, Expired
from fleet_worker.protocol.request import FleetRequest


class Submitter:
    """Sends requests, each on one of a few connections of its own, which are opened when they are needed.

    For any number of threads. kombu's own pools are those of the whole process, and stay open when a router is closed.
    """

    def __init__(self, app: Celery, transport: Transport) -> None:
        self._app = app
        self._transport = transport
        self._closed = False
        limit = app.conf.broker_pool_limit
        self._producers = ProducerPool(app.connection_for_write().Pool(limit), limit)

    def submit(self, request: FleetRequest, lane: str, *, patience: float) -> None:
        """Put this attempt at a request into a lane; return when the broker has it.

        While the broker is away, or silent, it is tried again for `patience` seconds in all, but not beyond the
        deadline of the request.

        Raises:
            BrokerUnavailable: the broker did not take it in that time; or it refused it, which is not tried again, nor
                said to be `retryable`.
            Cancelled: this was closed meanwhile.
            Expired: the deadline is over.
        """
        if request.remaining <= 0:
            raise Expired("the deadline passed before the request was sent")
        patience = min(patience, request.remaining)
        send = partial(self._send, request, lane, deadline=time.monotonic() + patience, silence=patience / 2)
        attempts = Retrying(
            retry=retry_if_exception(is_away),
            wait=wait_exponential(multiplier=0.05, max=min(1.0, patience / 10)) + wait_random(0, 0.05),
            stop=stop_before_delay(patience),
            reraise=True,
        )
        try:
            attempts(send)
        except BROKER_ERRORS as error:
            broker = self._app.conf.broker_url
            if is_away(error) or isinstance(error, LimitExceeded):
                said = f"did not take the request within {patience:.3g} s"
                raise unavailable(broker, said, error, retryable=True) from None
            raise unavailable(broker, "refused the request", error) from None

    @contextmanager
    def producer(self, timeout: float) -> Iterator[Producer]:
        """A connection to publish with, once one is free; raises one of kombu's errors if none is within `timeout`
        seconds, and `Cancelled` if this was closed."""
        producer = self._producers.acquire(block=True, timeout=timeout)
        connection = producer.connection
        try:
            if self._closed:
                raise Cancelled("the router was closed")
            yield producer
        finally:
            producer.release()
            if self._closed:
                connection.collect()

    def close(self) -> None:
        """Close all connections; those on which something is being sent, when that has ended."""
        self._closed = True
        idle = []
        with suppress(LimitExceeded):
            while True:
                idle.append(self._producers.acquire(block=False))
        for producer in idle:
            producer.connection.collect()
            producer.release()

    def _send(self, request: FleetRequest, lane: str, *, deadline: float, silence: float) -> None:
        """Send it once; what the broker has not answered after `silence` seconds is given up.

        A connection that died while nobody used it is noticed before anything is sent. But of a message that was sent,
        and for which the broker was lost or silent before it said that it has it, nobody knows: sent again, it may be
        in the lane twice. That costs work and no more, since the router listens to one node for each attempt and stops
        any other.
        """
        with self.producer(_left(deadline)) as producer:
            try:
                connect(producer.connection, min(silence, _left(deadline)))
                self._app.send_task(
                    task_name(request.operation),
                    args=[request.encode()],
                    task_id=request.request_id,
                    **route_to(lane, self._transport),
                    priority=priority(request.priority, self._transport),
                    # How long a lane's oldest request waits is told by this, so that nobody has to open it.
                    headers={SUBMITTED_AT: time.time()},
                    # Everybody sees these in events and in Flower: the lane, never the arguments.
                    argsrepr=lane,
                    kwargsrepr="",
                    ignore_result=True,
                    producer=producer,
                    retry=False,
                )
            except BaseException:
                # To close it in good manners is to wait for an answer, and the next message must not get this one's.
                producer.connection.collect()
                raise


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())
