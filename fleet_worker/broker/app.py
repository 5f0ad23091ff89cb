"""The Celery application of a router or a node: how brokers are used, and why.

Delivery is guaranteed end to end by the router's attempts, not by the broker's redelivery, which cannot tell a long
generation from a dead worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import kombu
from celery import Celery
from celery.app.amqp import AMQP, task_message
from celery.app.control import Control
from celery.app.events import Events
from celery.events.dispatcher import EventDispatcher
from kombu.clocks import LamportClock
from kombu.pidbox import Mailbox
from kombu.transport import pyamqp, redis
from kombu.utils.collections import HashedSeq

from fleet_worker.broker import amqp_transport, redis_transport, tls
from fleet_worker.broker.connection import ANSWER_WITHIN, HEARTBEAT, hang_up
from fleet_worker.broker.door import REPLY_SPARE_BYTES, SPARE_BYTES, Door
from fleet_worker.broker.faults import place_of
from fleet_worker.broker.topology import CONTROL_EXCHANGE, EVENT_EXCHANGE, transport_of
from fleet_worker.settings import Settings
from fleet_worker.urls import without_parameters

RECONNECT_EVERY = 2.0
"""Seconds between two tries to reach a broker that is away."""
MOST_EVENTS = 10_000
"""Task events that may wait for the event loop. With Celery's limit of 24, the thread of a task sends a full buffer: on
AMQP it then uses the connection at the same time as the event loop, and the node hangs."""


_TRANSPORTS = {
    redis.Transport: redis_transport.Transport,
    pyamqp.Transport: amqp_transport.Transport,
    pyamqp.SSLTransport: amqp_transport.SSLTransport,
}
"""Our subclasses of kombu's transports. Tests use its in-memory transport, too."""


class Connection(kombu.Connection):  # type: ignore[misc]
    door: Door
    """The one of its application."""
    shared_socket: redis_transport.SharedSocket | None = None
    """Redis: where the short commands are sent. With None, each channel opens a socket."""

    def get_transport_cls(self) -> Any:
        kombu_transport = super().get_transport_cls()
        return _TRANSPORTS.get(kombu_transport, kombu_transport)

    def __eqhash__(self) -> HashedSeq:
        """Be equal to no connection of another application, which may have other certificates: kombu has one pool for
        all that are equal. Each application has a type of its own."""
        return HashedSeq(type(self), *super().__eqhash__())

    def ensure_connection(self, *args: Any, **options: Any) -> Any:
        """Connect as kombu does, with a limit to its pauses. Celery has no setting for them: a worker whose broker is
        away would wait 2, 4, 6 ... 30 s before each try."""
        return super().ensure_connection(*args, **{"interval_max": RECONNECT_EVERY, **options})


class _AMQP(AMQP):  # type: ignore[misc]
    """Makes connections of a class that belongs to this application: they come through its door, and may share a socket
    for their short commands."""

    def __init__(self, door: Door, shared_socket: redis_transport.SharedSocket | None, app: Celery) -> None:
        super().__init__(app)
        shared = {"door": door, "shared_socket": shared_socket}
        self.Connection = self.BrokerConnection = type("Connection", (Connection,), shared)

    def as_task_v2(self, *args: Any, **options: Any) -> Any:
        """Return a task whose arguments are JSON in UTF-8. kombu would write six bytes for each character that is not
        ASCII, so that a text of an allowed size could be refused as too large."""
        task = super().as_task_v2(*args, **options)
        body = json.dumps(task.body, ensure_ascii=False, separators=(",", ":")).encode()
        properties = {**task.properties, "content_type": "application/json", "content_encoding": "utf-8"}
        return task_message(task.headers, properties, body, task.sent_event)


class _Clock(LamportClock):  # type: ignore[misc]
    def adjust(self, other: Any) -> Any:
        """Ignore a clock that is not a whole number: anybody may send a reply."""
        return super().adjust(other) if type(other) is int else self.value


class _Mailbox(Mailbox):  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"clock": _Clock(), **options})

    @contextmanager
    def producer_or_acquire(self, producer: Any = None, channel: Any = None) -> Iterator[Any]:
        """Send a command on the channel on which its replies arrive. Celery opens one more connection for it."""
        yield producer or _OneTry(channel, auto_declare=False)


class _OneTry(kombu.Producer):  # type: ignore[misc]
    def publish(self, *args: Any, **options: Any) -> Any:
        """Publish once. kombu tries it for ever while RabbitMQ takes no messages."""
        return super().publish(*args, **{**options, "retry": False})


class _Control(Control):  # type: ignore[misc]
    Mailbox = _Mailbox

    def broadcast(self, *args: Any, connection: Any = None, **options: Any) -> Any:
        """Ask with a connection that is closed afterwards. One of Celery's pool would stay open."""
        if connection:
            return super().broadcast(*args, connection=connection, **options)
        connection = self.app.connection_for_write()
        try:
            return super().broadcast(*args, connection=connection, **options)
        finally:
            hang_up(connection)


class _Dispatcher(EventDispatcher):  # type: ignore[misc]
    """Sends events on the connection that a node's consumer reads from, and never opens that again.

    kombu would do so without an error, if the broker was lost just before an event: then nothing reads from it any
    more, and the node is deaf for ever (seen). An event that is not sent waits for the consumer's next connection.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"buffer_limit": MOST_EVENTS, **options})

    def enable(self) -> None:
        # A producer without a channel would open the connection, too.
        self.channel: Any = self.channel or self.connection.default_channel
        super().enable()

    def _publish(self, *args: Any, **options: Any) -> None:
        super()._publish(*args, **{**options, "retry": False, "retry_policy": None})


class _Events(Events):  # type: ignore[misc]
    dispatcher_cls = _Dispatcher


def create_app(settings: Settings, *, is_node: bool = False) -> Celery:
    """Return a Celery application for a router or a node; it connects to nothing yet."""
    if settings.broker_tls and not settings.broker_tls.authenticates:
        tls.warn_once(place_of(settings.broker_url))
    shared_socket = redis_transport.SharedSocket() if is_node else None
    spare = SPARE_BYTES if is_node else REPLY_SPARE_BYTES
    amqp = partial(_AMQP, Door(settings.max_body_bytes + spare), shared_socket)
    app = Celery("fleet_worker", set_as_current=False, amqp=amqp, control=_Control, events=_Events)
    app.conf.update(
        broker_url=without_parameters(settings.broker_url),
        broker_use_ssl=tls.ssl_options(settings) or False,
        broker_transport_options=transport_options(settings),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=5,
        broker_heartbeat=HEARTBEAT,
        # RabbitMQ may close a channel, and py-amqp opens it again without its consumers. Start again, do not exit.
        broker_channel_error_retry=True,
        broker_pool_limit=16,
        # JSON only, and no results but our own replies.
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        # A node of N slots holds exactly N messages.
        worker_pool="threads",
        worker_prefetch_multiplier=1,
        # After a lost connection Celery would hold fewer, and restore the number from the threads of tasks as these
        # end, while the event loop reads: on RabbitMQ the worker then receives nothing for a minute (seen).
        worker_enable_prefetch_count_reduction=False,
        task_acks_late=True,
        # Remote control has a connection and a thread of its own: see control_listener.
        worker_enable_remote_control=False,
        # Another Celery application on this broker neither reaches our nodes nor is reached.
        control_exchange=CONTROL_EXCHANGE,
        event_exchange=EVENT_EXCHANGE,
        event_queue_prefix=EVENT_EXCHANGE,
        # Events for Flower. Those of the sender would carry arguments and open a metric series for every router.
        worker_send_task_events=True,
        task_send_sent_event=False,
        task_create_missing_queues=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        timezone="UTC",
    )
    return app


def door_of(app: Celery) -> Door:
    """Return the door of an application that `create_app` returned."""
    door: Door = app.amqp.Connection.door
    return door


def transport_options(settings: Settings) -> dict[str, Any]:
    if transport_of(settings.broker_url) == "amqp":
        return {"confirm_publish": True, "read_timeout": ANSWER_WITHIN, "write_timeout": ANSWER_WITHIN}
    return {
        # With it, a task that runs longer than the visibility timeout is started again and again, and a worker whose
        # broker restarts while a task runs exits (both measured).
        "ack_emulation": False,
        "socket_timeout": ANSWER_WITHIN,
        "socket_connect_timeout": 5.0,
        "socket_keepalive": True,
        "health_check_interval": 3,
    }
