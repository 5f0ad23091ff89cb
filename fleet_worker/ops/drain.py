"""Takes nodes out of service and back while their processes live: the operator's end and the node's.

Over Celery's remote control, since an operator waits for the answer.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from fleet_worker import exit_codes
from fleet_worker.broker import connection as connections
from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import BROKER_ERRORS, connect, unavailable
from fleet_worker.errors import InvalidRequest
from fleet_worker.registry.view import ALL_ANSWERS_WITHIN
from fleet_worker.router.router import Router
from fleet_worker.settings import REGISTRY, Settings

ANSWER_WITHIN = 2.0
"""Seconds that a node has to answer."""
HOST_ANSWERS_WITHIN = 1.5
"""Seconds in which all nodes of the hosts have to say who they are: nobody knows how many there are."""
LOOK_EVERY = 0.25
LETS_GO_WITHIN = 10.0
"""Seconds after its grace in which a node has to have let go of its work."""


@dataclass(frozen=True, slots=True)
class Drained:
    """What a node says. `running` are the requests that it has, `grace` the seconds that they get when it ends."""

    node: str
    drained: bool
    running: int
    handed_over: int
    grace: float


# --- The node's end --------------------------------------------------------------------------------------------------


# --- The operator's end ----------------------------------------------------------------------------------------------


class Draining:
    """Nodes are named as in `local@mini-7`; a host, as in `mini-7`, means all its inference nodes: those that answer,
    and those that its registry node knows.

    `silent` are those that did not answer. Every method raises `BrokerUnavailable` if the broker is not there.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app = create_app(settings)
        self.silent: list[str] = []

    def find(self, names: Iterable[str]) -> list[str]:
        """Return the nodes that are meant. A host of which no node answers or is known is a silent one."""
        names = list(dict.fromkeys(names))
        for name in names:
            if name.startswith(f"{REGISTRY}@"):
                raise InvalidRequest(f"{name} is a registry node, which works for nobody: name an inference node")
        nodes = self._nodes_of([name for name in names if "@" not in name])
        meant = {name: [name] if "@" in name else nodes[name] for name in names}
        self.silent += [name for name in names if not meant[name]]
        return list(dict.fromkeys(node for name in names for node in meant[name]))

    def drain(self, nodes: Sequence[str]) -> list[Drained]:
        return self._ask("drain", nodes)

    def undrain(self, nodes: Sequence[str]) -> list[Drained]:
        """One that is ending stays drained."""
        return self._ask("undrain", nodes)

    def wait(self, said: Sequence[Drained], seconds: float | None = None) -> Iterator[Drained]:
        """Yield what each node says when it has no more work. After so many seconds, or after the grace of the node,
        other nodes go on with what is left; what a node has not let go of soon after that is waited for no longer.
        """
        begun = time.monotonic()
        while said:
            late = time.monotonic() - begun
            working = [each for each in said if each.running and each.drained]
            yield from (each for each in said if each not in working)
            kept = [each for each in working if late >= _grace(each, seconds) + LETS_GO_WITHIN]
            yield from kept
            self._ask("hand_over", [each.node for each in working if late >= _grace(each, seconds)])
            time.sleep(LOOK_EVERY if working else 0)
            said = self._ask("drained", [each.node for each in working if each not in kept])

    def _nodes_of(self, hosts: Sequence[str]) -> dict[str, list[str]]:
        """The inference nodes of each. One that is starting or frozen does not answer, but takes work later."""
        if not hosts:
            return {}
        pattern = f".*@({'|'.join(map(re.escape, hosts))})$"
        there = set(self._broadcast("ping", pattern=pattern, matcher="pcre", timeout=HOST_ANSWERS_WITHIN))
        if any(name.startswith(f"{REGISTRY}@") for name in there):
            there |= self._known()
        nodes = sorted(name for name in there if not name.startswith(f"{REGISTRY}@"))
        return {host: [name for name in nodes if name.partition("@")[2] == host] for host in hosts}

    def _known(self) -> set[str]:
        """The nodes that registry nodes tell of."""
        with Router(self._settings) as router:
            registry = router.registry
            time.sleep(ALL_ANSWERS_WITHIN)  # the host that answers last may be the one that is meant
            return {instance.node for instance in registry.instances()}

    def _ask(self, command: str, nodes: Sequence[str]) -> list[Drained]:
        """What those say that answer, in their order."""
        if not nodes:
            return []
        said = self._broadcast(command, destination=list(nodes), limit=len(nodes), timeout=ANSWER_WITHIN)
        answers = {name: answer for name, answer in said.items() if "drained" in answer}
        self.silent += [name for name in nodes if name not in {*answers, *self.silent}]
        return [Drained(name, **answers[name]) for name in nodes if name in answers]

    def _broadcast(self, command: str, **options: Any) -> dict[str, Any]:
        """The answers, by node."""
        with self._app.connection_for_write() as connection:
            try:
                connect(connection, connections.ANSWER_WITHIN)
                said = self._app.control.broadcast(command, connection=connection, reply=True, **options)
            except BROKER_ERRORS as error:
                raise unavailable(self._app.conf.broker_url, "does not let the nodes be asked", error) from None
        return {name: answer for each in said for name, answer in each.items()}


def _grace(node: Drained, seconds: float | None) -> float:
    return node.grace if seconds is None else seconds


TAKES_WORK = "if it is starting, frozen or cut off, it takes work when it comes back: drain it again then."


STAYS_DRAINED = "if it is drained, and frozen or cut off, it still is when it comes back: undrain it again then."


def drain(settings: Settings, names: Iterable[str], *, wait: float | None = None) -> int:
    """Drain these, and return the exit code. With `wait`, only when nothing runs there any more: what runs has so many
    seconds, or with `math.inf` as many as its node gives it.
    """
    draining = Draining(settings)
    said = draining.drain(draining.find(names))
    if wait is None:
        return _tell(draining, said, lambda node: node.drained, TAKES_WORK)
    ended = draining.wait(said, None if math.isinf(wait) else wait)
    return _tell(draining, ended, lambda node: node.drained and not node.running, TAKES_WORK)


def undrain(settings: Settings, names: Iterable[str]) -> int:
    """Undrain these, and return the exit code."""
    draining = Draining(settings)
    return _tell(draining, draining.undrain(draining.find(names)), lambda node: not node.drained, STAYS_DRAINED)


def _tell(draining: Draining, said: Iterable[Drained], is_done: Callable[[Drained], bool], of_a_node: str) -> int:
    """`of_a_node` is the advice about one that does not answer."""
    all_done = True
    for node in said:
        click.echo(_words(node))
        all_done = all_done and is_done(node)
    for name in draining.silent:
        advice = of_a_node if "@" in name else "is it running, with its broker in reach?"
        click.echo(f"fleet-worker: {name} does not answer: {advice} fleet-worker status shows what there is", err=True)
    return exit_codes.UNAVAILABLE if draining.silent else 0 if all_done else exit_codes.FAILED


def _words(node: Drained) -> str:
    if not node.drained:
        return f"{node.node} is not drained: it takes work as soon as its MLX server has proved that it works"
    if node.running:
        return f"{node.node} is drained: it takes no more work, {_requests(node.running)} not finished yet"
    handed_over = f", {_requests(node.handed_over)} handed over to other nodes" if node.handed_over else ""
    return f"{node.node} is drained: nothing runs there any more{handed_over}"


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'}"
