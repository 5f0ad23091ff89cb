"""Celery's remote control, as far as a node answers it: which commands there are, who may ask, what a reply is.

Anybody who reaches the broker can send commands. Those of Celery that change something are refused: `shutdown`,
`rate_limit`, `cancel_consumer` and their like would end a node, or leave it without work while it is said to be ready.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from celery import Celery
from celery.utils.collections import AttributeDict
from celery.worker.control import Panel
from kombu import Exchange, Producer
from kombu.exceptions import InconsistencyError
from kombu.transport.redis import Channel as RedisChannel
from kombu.utils.limits import TokenBucket
from pydantic import Field

from fleet_worker.broker.door import Refused
from fleet_worker.errors import InvalidRequest, where
from fleet_worker.protocol.wire import BrokerMessage, ExtensibleModel

log = logging.getLogger(__name__)

READ_ONLY = ("ping", "stats", "conf", "active_queues", "registered", "active", "reserved", "scheduled", "revoked")
"""Commands of Celery that change nothing. Flower and `celery status` ask for them; none shows what a request holds."""
EVENTS_ARE_ON = "enable_events"
"""Flower sends this command every five seconds. Nodes always send task events, so it changes nothing."""
BY_NAME = frozenset({"restart", "restart_server"})
"""Commands that are obeyed only by nodes whose names they have, and not by all of a host or of the fleet: they would
all be away at the same time."""
MOST_NODES = 5_000
"""Names in the `destination` of one command."""
COMMANDS_A_SECOND, COMMANDS_AT_ONCE = 50, 200
"""More commands to one node than that are dropped. Flower sends eight at once, `drain --wait` four a second."""
REPLIES_EXPIRE = 60
"""Seconds after which Redis deletes replies to an asker that was killed. kombu sets a time only where it declares the
queue, which is in the asker: the list of a killed one would stay for ever."""

NO_COMMAND = "it is no control command"
PATTERN = "it is a control command with a pattern: name its nodes, or *@HOST"
TOO_FAST = "control commands come too fast"
NOT_OBEYED = "a node does not obey this control command"

Command = Callable[[Any], Any]
"""Is called with the state of Celery's worker. Returns the reply, which is JSON."""
_Name = Annotated[str, Field(max_length=255)]


class _ReplyTo(ExtensibleModel):
    exchange: _Name
    routing_key: _Name


class _CommandMessage(BrokerMessage):
    """A message of kombu's `pidbox`. The arguments of the command are not read: none of ours has any."""

    method: _Name
    destination: Annotated[list[str], Field(max_length=MOST_NODES, fail_fast=True)] | None = None
    pattern: str | None = None
    reply_to: _ReplyTo | None = None
    ticket: _Name | None = None


class ControlCommands:
    """Obeys the commands that are sent to a node, and replies. For one thread.

    `channel` has to be set to the channel that replies are published on. `commands` are added to those of `READ_ONLY`.
    """

    def __init__(self, app: Celery, node_name: str, commands: Mapping[str, Command]) -> None:
        self.state = AttributeDict(app=app, hostname=node_name, consumer=None, tset=set)
        self.channel: Any = None
        self._app = app
        self._name = node_name
        self._commands = {name: Panel.data[name] for name in (*READ_ONLY, EVENTS_ARE_ON)} | dict(commands)
        self._addresses = {node_name, f"*@{node_name.rpartition('@')[2]}"}
        self._allowed = TokenBucket(COMMANDS_A_SECOND, COMMANDS_AT_ONCE)

    def receive(self, message: Any) -> None:
        """Obey one message.

        Raises:
            Refused: it is no command, or one that is not obeyed; then the reply says so.
            one of BROKER_ERRORS: the reply could not be published.
        """
        command = _decode(message.body)
        if not self._is_addressed(command):
            return
        if not self._allowed.can_consume():
            raise Refused(TOO_FAST)
        is_known = command.method in self._commands
        reply = self._run(command.method) if is_known else {"error": f"{NOT_OBEYED}; it obeys: {self._known()}"}
        if command.reply_to and command.ticket and command.reply_to.exchange == self._reply_exchange:
            self._reply(reply, command.reply_to.routing_key, command.ticket)
        if not is_known:
            raise Refused(NOT_OBEYED, command.method)

    @property
    def _reply_exchange(self) -> str:
        return str(self._app.control.mailbox.reply_exchange.name)

    def _is_addressed(self, command: _CommandMessage) -> bool:
        """A node is addressed by its name, by `*@HOST`, or with all others; but see `BY_NAME`.

        kombu's patterns are not obeyed: with a regular expression of a stranger this thread may never be done.
        """
        if command.pattern:
            raise Refused(PATTERN)
        if command.method in BY_NAME:
            return self._name in (command.destination or ())
        return not command.destination or not self._addresses.isdisjoint(command.destination)

    def _run(self, method: str) -> Any:
        try:
            return self._commands[method](self.state)
        except Exception as error:
            log.error("the control command %s failed: %s at %s", method, type(error).__name__, where(error))
            return {"error": f"the command failed ({type(error).__name__}): see the node's log"}

    def _known(self) -> str:
        return ", ".join(sorted(self._commands.keys() - {EVENTS_ARE_ON}))

    def _reply(self, reply: Any, routing_key: str, ticket: str) -> None:
        """Publish on our own channel. kombu would reconnect without an error, and nothing would be received then."""
        with contextlib.suppress(InconsistencyError):  # its reader is gone
            Producer(self.channel, auto_declare=False).publish(
                {self._name: reply},
                exchange=self._reply_exchange,
                routing_key=routing_key,
                declare=[Exchange(self._reply_exchange, "direct", durable=False, delivery_mode="transient")],
                headers={"ticket": ticket},
                serializer="json",
                retry=False,
            )
        if isinstance(self.channel, RedisChannel):
            with self.channel.conn_or_acquire() as client:
                client.expire(f"{routing_key}.{self._reply_exchange}", REPLIES_EXPIRE)


def _decode(body: bytes) -> _CommandMessage:
    try:
        return _CommandMessage.decode(body)
    except InvalidRequest:
        raise Refused(NO_COMMAND) from None
