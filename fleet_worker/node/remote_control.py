"""The control commands that a node obeys: drain, hand_over, undrain, drained."""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command, inspect_command

from fleet_worker.node.node import Node


def answer_operators(node: Node) -> None:
    """Let the worker of this process obey these commands, also those of `celery control` and `celery inspect`."""

    def said() -> dict[str, Any]:
        grace = node.settings.worker.drain_grace
        return {"drained": node.drained, "running": node.held, "handed_over": node.handed_over, "grace": grace}

    @control_command()  # type: ignore[untyped-decorator]
    def drain(state: Any, **_: Any) -> dict[str, Any]:
        """Take no more work."""
        node.drain()
        return said()

    @control_command()  # type: ignore[untyped-decorator]
    def hand_over(state: Any, **_: Any) -> dict[str, Any]:
        """Let other nodes go on with what is running, if it is drained."""
        if node.drained:
            node.hand_over()
        return said()

    @control_command()  # type: ignore[untyped-decorator]
    def undrain(state: Any, **_: Any) -> dict[str, Any]:
        """Take work again."""
        node.undrain()
        return said()

    @inspect_command()  # type: ignore[untyped-decorator]
    def drained(state: Any, **_: Any) -> dict[str, Any]:
        """Whether it takes no work, and how many requests it has."""
        return said()
