"""What a node receives besides requests: Celery's remote control, and a fanout of our own.

It has a thread and a connection of its own. Celery's Control step receives nothing while a worker reconnects or ends.
That takes up to half a minute, in which cancels are needed most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from amqp.exceptions import ResourceLocked
from celery import Celery, bootsteps
from kombu import Connection, Consumer, Queue

from fleet_worker.broker.connection import check_alive, open_channel, receive
from fleet_worker.broker.control_commands import Command, ControlCommands
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import Transport, transport_of

PING_EVERY = 2
"""Seconds of silence after which Redis is asked whether it is there."""
LISTENS_WITHIN = 2.0
"""Seconds that a starting worker waits until it receives commands; the broker may be away again."""
CLOSED_WITHIN = 2.0
"""Seconds that an ending worker waits until the connection is closed."""

Subscription = tuple[Callable[[Transport], Queue], Callable[[Any], object]]
"""A function that returns a new queue of a fanout, and one that is called with each of its messages."""


class ControlListener:
    """Receives while a worker of this application runs, from before it takes work until it has ended.

    `commands` are for this node only, and not for other workers of the process. What is sent while the broker is away
    is lost. `connected` is called when that changes: with whether it receives, and whether it receives commands, too.
    """

    def __init__(
        self,
        app: Celery,
        node_name: str,
        subscription: Subscription,
        commands: Mapping[str, Command],
        connected: Callable[[bool, bool], object] = lambda connected, has_commands: None,
    ) -> None:
        self._app = app
        self._name = node_name
        self._transport = transport_of(app.conf.broker_url)
        self._new_queue, self._receive = subscription
        self._connected = connected
        self._commands = ControlCommands(app, node_name, commands)
        self._thread = ReconnectingThread(
            "remote control", app.connection_for_read, self._listen, lambda _: connected(False, False)
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
                is_first = listener._commands.state.consumer is None
                listener._commands.state.consumer = consumer
                if is_first:
                    listener.start()
                    listener._thread.worked.wait(LISTENS_WITHIN)

            def shutdown(self, consumer: Any) -> None:
                listener.close(CLOSED_WITHIN)  # or Redis would keep the name of its control queue

        return RemoteControl

    def _listen(self, connection: Connection) -> None:
        # RabbitMQ need not confirm replies: while a confirmation is waited for, the next command would be obeyed inside
        # the wait, and take the confirmation of the first.
        options = {"health_check_interval": PING_EVERY, "confirm_publish": False}
        connection.transport_options = {**connection.transport_options, **options}
        channel = open_channel(connection)
        queue = self._new_queue(self._transport)
        Consumer(channel, [queue], on_message=self._receive, no_ack=True).consume()
        # RabbitMQ closes the channel if it refuses the control queue. On Redis, a second channel needs a second socket.
        self._commands.channel = connection.channel() if self._transport == "amqp" else channel
        has_commands = self._consume_commands(connection)
        receive(connection, 0.01)  # only now kombu's Redis transport subscribes
        self._connected(True, has_commands)
        self._thread.works()  # the worker begins to take work
        while not self._thread.closed.is_set():
            receive(connection, 0.5)
            check_alive(connection, channel)
            self._thread.works()
            if not has_commands and (has_commands := self._consume_commands(connection)):
                self._connected(True, True)

    def _consume_commands(self, connection: Connection) -> bool:
        """Return False if RabbitMQ refuses for now: a lost connection of this node may still own the control queue."""
        queue = self._app.control.mailbox.get_queue(self._name)
        try:
            Consumer(self._commands.channel, [queue], on_message=self._commands.receive, no_ack=True).consume()
        except ResourceLocked:
            return False
        return True
