"""The control commands of an inference node: drain, hand_over, undrain, drained."""

from __future__ import annotations

from typing import Any

from fleet_worker.broker.control_listener import Command
from fleet_worker.node.node import Node


def commands_of(node: Node) -> dict[str, Command]:
    """Return the commands by name. Each replies with the node's work after it."""

    def work() -> dict[str, Any]:
        grace = node.settings.worker.drain_grace
        return {"drained": node.drained, "running": node.held, "handed_over": node.handed_over, "grace": grace}

    def drain(state: Any, **_: Any) -> dict[str, Any]:
        """Take no more work."""
        node.drain()
        return work()

    def hand_over(state: Any, **_: Any) -> dict[str, Any]:
        """If it is drained, let other nodes continue what is running."""
        if node.drained:
            node.hand_over()
        return work()

    def undrain(state: Any, **_: Any) -> dict[str, Any]:
        """Take work again."""
        node.undrain()
        return work()

    def drained(state: Any, **_: Any) -> dict[str, Any]:
        """Change nothing."""
        return work()

    return {command.__name__: command for command in (drain, hand_over, undrain, drained)}
