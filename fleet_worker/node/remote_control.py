"""What an inference node is told: by routers what they cancel and what they have missed, by operators to drain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fleet_worker.broker.control_commands import Command
from fleet_worker.broker.control_listener import Subscription
from fleet_worker.broker.door import Refused
from fleet_worker.broker.topology import cancel_queue
from fleet_worker.errors import InvalidRequest
from fleet_worker.node.node import Node
from fleet_worker.protocol.request import ControlMessage


def subscription_of(node: Node) -> Subscription:
    """Return what the node does with each notice of a router.

    A notice may be lost while the broker is away. A router repeats a cancel as long as it sees the request go on.
    """

    def obey(message: Any) -> None:
        try:
            notice = ControlMessage.decode(message.body)
        except InvalidRequest:
            raise Refused("it is no notice of a router") from None
        if notice.router:
            node.router_clocks.told(notice.router, notice.sent_at)
        if notice.node in (None, node.name):
            for request_id, attempt in notice.cancelled:
                node.running.cancel(request_id, attempt)
            for request_id, attempt in notice.confirmed:
                node.confirmations.confirm(request_id, attempt)
            if notice.missed:
                node.publisher.publish_again(notice.missed)

    return cancel_queue, obey


def commands_of(node: Node) -> dict[str, Command]:
    """Return the control commands by name. Each replies with the node's work after it."""

    def hand_over() -> None:
        if node.drained:
            node.hand_over()

    def replying(act: Callable[[], object]) -> Command:
        def command(state: Any) -> dict[str, Any]:
            act()
            grace = node.settings.worker.drain_grace
            return {"drained": node.drained, "running": node.held, "handed_over": node.handed_over, "grace": grace}

        return command

    acts = {"drain": node.drain, "hand_over": hand_over, "undrain": node.undrain, "drained": lambda: None}
    return {name: replying(act) for name, act in acts.items()}
