"""The Celery application: how brokers are used, and why. `celery -A fleet_worker` finds `app` here.

Delivery is guaranteed end to end by the router's attempts, not by the broker's redelivery, which cannot tell a long
generation from a dead worker.
"""

from __future__ import annotations

import functools
from typing import Any

import kombu
import kombu.transport.redis
import kombu.transport.virtual
from celery import Celery
from kombu.utils.json import dumps

from fleet_worker.broker.connection import ANSWER_WITHIN, HEARTBEAT
from fleet_worker.broker.topology import transport_of
from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings

__all__ = ["create_app"]

RECONNECT_EVERY = 2.0
"""Seconds between two looks for a broker that is away."""

# When a Redis connection drops, kombu puts the messages that are being worked on back into their queue, and the same
# worker takes them a second time while the first still runs (measured, kombu 5.7). Our tasks survive the drop.
kombu.transport.redis.Channel.do_restore = False


def _restoring_nothing(qos: Any, *args: Any, **options: Any) -> None:
    """kombu would do it when the interpreter exits, and until then keeps every channel whose connection broke before it
    was closed, with its sockets (three open files each time)."""
    _begin_qos(qos, *args, **options)
    qos._on_collect.cancel()


_begin_qos = kombu.transport.virtual.QoS.__init__
kombu.transport.virtual.QoS.__init__ = _restoring_nothing


def _one_client_per_pool(channel: Any, asynchronous: bool = False) -> Any:
    """kombu makes a new redis client for every publish, which costs as much as the publish (0.1 ms of 0.24)."""
    pool = channel.async_pool if asynchronous else channel.pool
    if not hasattr(pool, "fleet_client"):
        pool.fleet_client = _create_client(channel, asynchronous)
    return pool.fleet_client


_create_client = kombu.transport.redis.Channel._create_client
kombu.transport.redis.Channel._create_client = _one_client_per_pool


def _give_back(channel: Any, message: Any) -> None:
    """kombu puts what a worker gives back behind all that has come since."""
    sent, info = message.serializable(), message.delivery_info
    sent["redelivered"] = True
    for queue in channel._lookup(info["exchange"], info["routing_key"]):
        key = channel._q_for_pri(queue, channel._get_message_priority(sent, reverse=False))
        with channel.conn_or_acquire() as client, client.pipeline() as pipe:
            pipe.rpush(key, dumps(sent))
            if queue in channel._expires:
                pipe.pexpire(key, channel._expires[queue])
            pipe.execute()


kombu.transport.redis.Channel._restore_at_beginning = _give_back


def _forgetting_older_connections(transport: Any, connection: Any, loop: Any) -> None:
    """A worker has one connection that reads, but kombu leaves a callback of every former one in its event loop, which
    runs all of them in each turn and keeps their memory (0.1 MB)."""
    loop.on_tick.clear()
    _register(transport, connection, loop)


_register = kombu.transport.redis.Transport.register_with_event_loop
kombu.transport.redis.Transport.register_with_event_loop = _forgetting_older_connections


def _within_seconds(connection: Any, *args: Any, **options: Any) -> Any:
    """Celery has no setting for this: a worker whose broker is away would wait 2, 4, 6 ... 30 s before each look."""
    return _ensure_connection(connection, *args, **{"interval_max": RECONNECT_EVERY, **options})


_ensure_connection = kombu.Connection.ensure_connection
kombu.Connection.ensure_connection = _within_seconds


def create_app(settings: Settings) -> Celery:
    """Return a Celery application for a router or a node; it connects to nothing yet."""
    app = Celery("fleet_worker", set_as_current=False)
    app.conf.update(
        broker_url=settings.broker_url,
        broker_transport_options=transport_options(settings),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=5,
        broker_heartbeat=HEARTBEAT,
        # A channel that RabbitMQ closes, and py-amqp opens again, has no consumers any more: begin anew, do not end.
        broker_channel_error_retry=True,
        broker_pool_limit=16,
        # JSON only, and no results but our own replies.
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        # A node of N slots holds exactly N messages.
        worker_pool="threads",
        worker_prefetch_multiplier=1,
        # After a lost connection Celery would hold fewer and restore that from the threads of tasks, as these end, in
        # the middle of what the event loop reads: on RabbitMQ the worker then hears nothing for a minute (seen).
        worker_enable_prefetch_count_reduction=False,
        task_acks_late=True,
        # Events for Flower. Those of the sender would carry arguments and open a metric series for every router.
        worker_send_task_events=True,
        task_send_sent_event=False,
        task_create_missing_queues=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        timezone="UTC",
    )
    return app


def transport_options(settings: Settings) -> dict[str, Any]:
    if transport_of(settings.broker_url) == "amqp":
        return {"confirm_publish": True, "read_timeout": ANSWER_WITHIN, "write_timeout": ANSWER_WITHIN}
    return {
        # Without it a task that runs longer than the visibility timeout is run again and again, and a worker whose
        # broker restarts under a running task exits (both measured).
        "ack_emulation": False,
        # Seconds until a lane that was joined is served: a wait for messages of the old ones has to end first.
        "polling_interval": 0.25,
        "socket_timeout": ANSWER_WITHIN,
        "socket_connect_timeout": 5.0,
        "socket_keepalive": True,
        "health_check_interval": 5,
    }


@functools.cache
def _app() -> Celery:
    # The worker's side is imported only where a worker may run.
    from fleet_worker.node.worker import refuse, serve_with

    try:
        settings = Settings()
    except ConfigurationError as error:
        refuse(error)
    app = create_app(settings)
    serve_with(app, settings)
    return app


def __getattr__(name: str) -> Any:
    # `celery -A fleet_worker` asks for `app`. Settings are read then, not when this module is imported.
    if name == "app":
        return _app()
    raise AttributeError(name)
