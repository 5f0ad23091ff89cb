"""The Celery application of a router or a node: how brokers are used, and why.

Delivery is guaranteed end to end by the router's attempts, not by the broker's redelivery, which cannot tell a long
generation from a dead worker.
"""

from __future__ import annotations

from typing import Any

import kombu
from celery import Celery
from celery.app.amqp import AMQP
from kombu.transport import redis

from fleet_worker.broker.connection import ANSWER_WITHIN, HEARTBEAT
from fleet_worker.broker.redis_transport import Transport
from fleet_worker.broker.topology import transport_of
from fleet_worker.settings import Settings

RECONNECT_EVERY = 2.0
"""Seconds between two tries to reach a broker that is away."""


class Connection(kombu.Connection):  # type: ignore[misc]
    def get_transport_cls(self) -> Any:
        kombu_transport = super().get_transport_cls()
        return Transport if kombu_transport is redis.Transport else kombu_transport

    def ensure_connection(self, *args: Any, **options: Any) -> Any:
        """Connect as kombu does, with a limit to its pauses. Celery has no setting for them: a worker whose broker is
        away would wait 2, 4, 6 ... 30 s before each try."""
        return super().ensure_connection(*args, **{"interval_max": RECONNECT_EVERY, **options})


class _AMQP(AMQP):  # type: ignore[misc]
    Connection = BrokerConnection = Connection


def create_app(settings: Settings) -> Celery:
    """Return a Celery application for a router or a node; it connects to nothing yet."""
    app = Celery("fleet_worker", set_as_current=False, amqp=_AMQP)
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
