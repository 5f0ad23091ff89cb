"""Tells a node to restart: the node itself, or, if it does not answer, the `fleet-worker up` of this host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fleet_worker.host.up_socket import NoUp, ask
from fleet_worker.ops.node_control import NodeControl
from fleet_worker.protocol.host_messages import Restart
from fleet_worker.protocol.status import Measured, Name, Reason, Total
from fleet_worker.settings import Settings

UP_ANSWERS_WITHIN = 5.0


@dataclass(frozen=True, slots=True)
class RestartReply:
    """The answer of a node, or of its `up`; `process` and `server_restarts` are those before the
    restart, as in `InstanceStatus`."""

    node: str
    error: Reason = ""
    """Why it is not restarted; empty if it is."""
    again_in: Measured = 0.0
    """It was restarted just now, and can be again in so many seconds."""
    process: Name = ""
    server_restarts: Total | None = None
    grace: Measured = 0.0
    """Seconds that its running requests have."""


class RestartControl(NodeControl):
    """Tells nodes to restart, or to have their MLX servers restarted (`server`)."""

    def __init__(self, settings: Settings, *, server: bool) -> None:
        super().__init__(settings)
        self.server = server

    def restart(self, node: str) -> RestartReply | None:
        """Tell a node to restart. Return its answer, or, if it does not answer and belongs to this host, that of `up`;
        None if nobody answers. Raises `BrokerUnavailable`."""
        command = "restart_server" if self.server else "restart"
        reply = _reply(node, self.tell(command, [node]).get(node)) or self.ask_up(node)
        if reply is None:
            self.silent.append(node)
        return reply

    def is_here(self, node: str) -> bool:
        return node.partition("@")[2] == self._settings.host

    def ask_up(self, node: str) -> RestartReply | None:
        """Ask the `up` of this host; return None if there is none, or if the node belongs to another one."""
        if not self.is_here(node):
            return None
        wish = Restart(instance=node.partition("@")[0], server=self.server)
        try:
            return RestartReply(node, error=ask(self._settings, wish, UP_ANSWERS_WITHIN).error)
        except NoUp:
            return None


_REPLY = TypeAdapter(RestartReply)


def _reply(node: str, reply: Any) -> RestartReply | None:
    try:
        return _REPLY.validate_python({**reply, "node": node})
    except (TypeError, ValidationError):  # a node of another version, or a stranger, replies
        return None
