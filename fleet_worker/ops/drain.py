"""`fleet-worker drain` and `undrain`: take nodes out of service and back while their processes go on running."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from fleet_worker import exit_codes
from fleet_worker.ops.node_control import NodeControl, print_silent
from fleet_worker.settings import Settings
from fleet_worker.terminal import count

ASK_EVERY = 0.25
"""Seconds between two questions while nodes finish their work."""
RELEASE_WITHIN = 10.0
"""Seconds after its grace in which a node must have handed over its work."""
DRAIN_AGAIN = (
    "check its name; if it is starting, frozen or cut off, it takes work when it comes back: drain it again then."
)
UNDRAIN_AGAIN = (
    "check its name; if it is drained, and frozen or cut off, it stays drained when it comes back: undrain it again "
    "then."
)


def drain(settings: Settings, names: Iterable[str], *, wait: float | None = None) -> int:
    """Drain nodes, print their answers, and return the exit code.

    With `wait`, return when nothing runs there any more. After so many seconds, or with `math.inf` after the grace of
    the node, what still runs is handed over to other nodes.
    """
    control = DrainControl(settings)
    answers = control.ask("drain", control.find(names))
    if wait is None:
        return _print(control, answers, lambda node: node.drained, DRAIN_AGAIN)
    ended = control.wait(answers, None if math.isinf(wait) else wait)
    return _print(control, ended, lambda node: node.drained and not node.running, DRAIN_AGAIN)


def undrain(settings: Settings, names: Iterable[str]) -> int:
    """Undrain nodes, print their answers, and return the exit code."""
    control = DrainControl(settings)
    return _print(control, control.ask("undrain", control.find(names)), lambda node: not node.drained, UNDRAIN_AGAIN)


# --- Asking the nodes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DrainState:
    """The answer of a node: its running requests, and the seconds that they get when it ends."""

    node: str
    drained: bool
    running: int
    handed_over: int
    grace: float

    @property
    def is_working(self) -> bool:
        """It is drained, and its requests have not ended yet."""
        return self.drained and self.running > 0


class DrainControl(NodeControl):
    """Drains nodes. Every method raises `BrokerUnavailable` if the broker does not answer."""

    def ask(self, command: str, nodes: Sequence[str]) -> list[DrainState]:
        """Send `drain`, `undrain`, `hand_over` or `drained` (a question), and return the states of the nodes that
        answer, in their order. A node that is ending stays drained.
        """
        replies = self.tell(command, nodes)
        states = {name: state for name in nodes if (state := _state(name, replies.get(name)))}
        self.silent += [name for name in nodes if name not in {*states, *self.silent}]
        return list(states.values())

    def wait(self, states: Sequence[DrainState], seconds: float | None = None) -> Iterator[DrainState]:
        """Yield the state of each node when it has no more work.

        After `seconds`, or else the grace of the node, it is told to hand its work over to other nodes. If it still
        has work `RELEASE_WITHIN` seconds later, its state is yielded as it is.
        """
        begun = time.monotonic()
        while states:
            elapsed = time.monotonic() - begun
            late = {each: elapsed - (each.grace if seconds is None else seconds) for each in states}
            working = [each for each in states if each.is_working and late[each] < RELEASE_WITHIN]
            yield from (each for each in states if each not in working)
            self.ask("hand_over", [each.node for each in states if each.is_working and late[each] >= 0])
            time.sleep(ASK_EVERY if working else 0)
            states = self.ask("drained", [each.node for each in working])


_DRAIN_STATE = TypeAdapter(DrainState)


def _state(node: str, reply: Any) -> DrainState | None:
    """Return what a node has replied; None if that is no state: a node of another version, or a stranger, replies."""
    try:
        return _DRAIN_STATE.validate_python({**reply, "node": node})
    except (TypeError, ValidationError):
        return None


# --- Printing the answers --------------------------------------------------------------------------------------------


def _print(
    control: DrainControl, states: Iterable[DrainState], is_done: Callable[[DrainState], bool], advice: str
) -> int:
    """Print a line per node; `advice` is about a node that does not answer. Return the exit code."""
    all_done = True
    for node in states:
        click.echo(_describe(node))
        all_done = all_done and is_done(node)
    print_silent(control.silent, advice)
    return exit_codes.UNAVAILABLE if control.silent else 0 if all_done else exit_codes.FAILED


def _describe(node: DrainState) -> str:
    if not node.drained:
        return f"{node.node} is not drained: it takes work as soon as its MLX server has proved that it works"
    if node.running:
        return f"{node.node} is drained: it takes no more work, {count(node.running, 'request')} not finished yet"
    handed_over = f", {count(node.handed_over, 'request')} handed over to other nodes" if node.handed_over else ""
    return f"{node.node} is drained: nothing runs there any more{handed_over}"
