"""`fleet-worker drain` and `undrain`: take nodes out of service and back while their processes go on running.

Nodes are asked by Celery's remote control, since an operator waits for the answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from fleet_worker import exit_codes
from fleet_worker.broker.app import create_app
from fleet_worker.errors import InvalidRequest
from fleet_worker.ops.broker_checks import connected
from fleet_worker.registry.view import ALL_ANSWERS_WITHIN
from fleet_worker.router.router import Router
from fleet_worker.settings import REGISTRY, Settings
from fleet_worker.terminal import count

NODE_ANSWERS_WITHIN = 2.0
"""Seconds that a node has to answer."""
HOST_ANSWERS_WITHIN = 1.5
"""Seconds that all nodes of a host have to answer: their number is unknown, so this is always waited for."""
MOST_NODES = 10_000
"""Answers of the nodes of hosts that are read in that time."""
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


class DrainControl:
    """Drains nodes. Their names are as in `local@mini-7`, hosts as in `mini-7`.

    Every method raises `BrokerUnavailable` if the broker does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app = create_app(settings)
        self.silent: list[str] = []
        """Nodes, and hosts, that did not answer."""

    def find(self, names: Iterable[str]) -> list[str]:
        """Return the nodes of these names. A host means all its inference nodes: those that answer, and those that its
        registry node knows, since one that is starting or frozen does not answer, but may take work later.

        Raises:
            InvalidRequest: a registry node is named.
        """
        names = list(dict.fromkeys(names))
        for name in names:
            if name.startswith(f"{REGISTRY}@"):
                raise InvalidRequest(f"{name} is a registry node, which runs no requests: name an inference node")
        of_hosts = self._nodes_of([name for name in names if "@" not in name])
        found: list[str] = []
        for name in names:
            nodes = [name] if "@" in name else [node for node in of_hosts if node.partition("@")[2] == name]
            found += nodes
            if not nodes:
                self.silent.append(name)
        return list(dict.fromkeys(found))

    def ask(self, command: str, nodes: Sequence[str]) -> list[DrainState]:
        """Send `drain`, `undrain`, `hand_over` or `drained` (a question), and return the states of the nodes that
        answer, in their order. A node that is ending stays drained.
        """
        if not nodes:
            return []
        replies = self._broadcast(command, destination=list(nodes), limit=len(nodes), timeout=NODE_ANSWERS_WITHIN)
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

    def _nodes_of(self, hosts: Sequence[str]) -> list[str]:
        if not hosts:
            return []
        all_nodes = [f"*@{host}" for host in hosts]
        found = set(self._broadcast("ping", destination=all_nodes, limit=MOST_NODES, timeout=HOST_ANSWERS_WITHIN))
        if any(name.startswith(f"{REGISTRY}@") for name in found):
            with Router(self._settings) as router:
                registry = router.registry
                time.sleep(ALL_ANSWERS_WITHIN)  # the host in question may answer last
                found |= {instance.node for instance in registry.instances()}
        return sorted(name for name in found if not name.startswith(f"{REGISTRY}@"))

    def _broadcast(self, command: str, **options: Any) -> dict[str, Any]:
        """The replies by node."""
        with connected(self._settings) as connection:
            replies = self._app.control.broadcast(command, connection=connection, reply=True, **options)
        return {name: reply for each in replies if isinstance(each, dict) for name, reply in each.items()}


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
    for name in control.silent:
        what = f"{name} does not answer: {advice}"
        if "@" not in name:
            what = f"{name} is no host that answers: does it run, and use this broker? A node is named {name}@HOST."
        click.echo(f"fleet-worker: {what} fleet-worker status shows all nodes", err=True)
    return exit_codes.UNAVAILABLE if control.silent else 0 if all_done else exit_codes.FAILED


def _describe(node: DrainState) -> str:
    if not node.drained:
        return f"{node.node} is not drained: it takes work as soon as its MLX server has proved that it works"
    if node.running:
        return f"{node.node} is drained: it takes no more work, {count(node.running, 'request')} not finished yet"
    handed_over = f", {count(node.handed_over, 'request')} handed over to other nodes" if node.handed_over else ""
    return f"{node.node} is drained: nothing runs there any more{handed_over}"
