"""What a node receives besides requests: Celery's remote control, and a fanout of our own.

It has a thread and a connection of its own. Celery's Control step receives nothing while a worker reconnects or ends.
That takes up to half a minute, in which cancels are needed most.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from amqp.exceptions import ResourceLocked
from celery import Celery, bootsteps
from celery.utils.collections import AttributeDict
from celery.worker.control import Panel
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.exceptions import InconsistencyError, SerializationError
from kombu.pidbox import Node

from fleet_worker.broker.connection import BROKER_ERRORS, hear, open_channel, prove
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import Transport, transport_of

log = logging.getLogger(__name__)

LISTENS_WITHIN = 2.0
"""Seconds that a starting worker waits until it receives commands; the broker may be away again."""
CLOSED_WITHIN = 2.0
"""Seconds that an ending worker waits until the connection is closed."""

Subscription = tuple[Callable[[Transport], Queue], Callable[[Any], object]]
"""A function that returns a new queue of a fanout, and one that is called with each of its messages."""
Command = Callable[..., Any]
"""Is called with the state of Celery's worker, and with the arguments of the command. Returns the reply."""


class ControlListener:
    """Receives while a worker of this application runs, from before it takes work until it has ended.

    `commands` are added to those of Celery, for this node only and not for other workers of the process. What is sent
    while the broker is away is lost; `connected` is called with True when it receives, and with False when it does not
    any more.
    """

    def __init__(
        self,
        app: Celery,
        node_name: str,
        subscription: Subscription,
        commands: Mapping[str, Command],
        connected: Callable[[bool], object] = lambda connected: None,
    ) -> None:
        self._transport = transport_of(app.conf.broker_url)
        self._new_queue, self._receive = subscription
        self._connected = connected
        self._state = AttributeDict(app=app, hostname=node_name, consumer=None, tset=set)
        handlers = {**Panel.data, "heartbeat": _send_heartbeat, **commands}
        self._mailbox = _Node(node_name, state=self._state, handlers=handlers, mailbox=app.control.mailbox)
        self._thread = ReconnectingThread(
            "remote control", app.connection_for_read, self._listen, lambda _: connected(False)
        )
        app.steps["consumer"].add(self._step())

    def start(self) -> None:
        """Called when Celery's consumer has connected for the first time."""
        self._thread.start()

    def close(self, timeout: float = 0.0) -> None:
        """Called when the worker has ended. Wait for the thread at most `timeout` seconds."""
        self._thread.close(timeout)

    def _step(self) -> type[bootsteps.StartStopStep]:
        listener = self

        class RemoteControl(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.tasks:Tasks",)

            def start(self, consumer: Any) -> None:
                """Celery calls this for each connection of its own."""
                is_first = listener._state.consumer is None
                listener._state.consumer = consumer
                if is_first:
                    listener.start()
                    listener._thread.worked.wait(LISTENS_WITHIN)

            def shutdown(self, consumer: Any) -> None:
                listener.close(CLOSED_WITHIN)  # or Redis would keep the name of its control queue

        return RemoteControl

    def _listen(self, connection: Connection) -> None:
        # Redis is asked every second whether it is there. RabbitMQ need not confirm replies: while a confirmation is
        # waited for, the next command would be obeyed inside the wait, and take the confirmation of the first.
        options = {"health_check_interval": 1, "confirm_publish": False}
        connection.transport_options = {**connection.transport_options, **options}
        channel = open_channel(connection)
        queue = self._new_queue(self._transport)
        Consumer(channel, [queue], on_message=self._receive, no_ack=True).consume()
        # RabbitMQ closes the channel if it refuses the control queue. On Redis, a second channel needs a second socket.
        self._mailbox.channel = connection.channel() if self._transport == "amqp" else channel
        has_commands = self._consume_commands(connection)
        hear(connection, 0.01)  # only now kombu's Redis transport subscribes
        self._thread.works()
        self._connected(True)
        while not self._thread.closed.is_set():
            hear(connection, 0.5)
            prove(connection, channel)
            has_commands = has_commands or self._consume_commands(connection)

    def _consume_commands(self, connection: Connection) -> bool:
        """Return False if RabbitMQ refuses for now: a lost connection of this node may still own the control queue."""
        try:
            self._mailbox.listen(callback=self._obey)
        except ResourceLocked:
            return False
        return True

    def _obey(self, body: Any, message: Any) -> None:
        self._state.app.clock.forward()
        try:
            self._mailbox.handle_message(body, message)
        except SystemExit:  # the command `shutdown`
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            if isinstance(error, BROKER_ERRORS) and not isinstance(error, SerializationError):
                raise
            self._mailbox.on_decode_error(message, error)


class _Node(Node):  # type: ignore[misc]
    def on_decode_error(self, message: Any, error: Exception) -> None:
        log.error("a control command was dropped (%s)", type(error).__name__)

    def reply(self, data: Any, exchange: str, routing_key: str, ticket: str, **_: Any) -> None:
        """Publish on our own channel. kombu would reconnect without an error, and nothing would be received then."""
        with contextlib.suppress(InconsistencyError):  # its reader is gone
            Producer(self.channel, auto_declare=False).publish(
                data,
                exchange=exchange,
                routing_key=routing_key,
                declare=[Exchange(exchange, "direct", durable=False, delivery_mode="transient")],
                headers={"ticket": ticket, "clock": self.mailbox.clock.forward()},
                serializer=self.mailbox.serializer,
                retry=False,
            )


def _send_heartbeat(state: Any) -> None:
    """Only the event loop may use the connection that events are sent on."""
    state.consumer.call_soon(partial(Panel.data["heartbeat"], state))
