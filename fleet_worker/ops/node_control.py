"""Nodes are told what an operator wants by Celery's remote control, since somebody waits for the answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

from fleet_worker.broker.app import create_app
from fleet_worker.errors import InvalidRequest
from fleet_worker.ops.broker_checks import connected
from fleet_worker.registry.view import ALL_ANSWERS_WITHIN
from fleet_worker.router.router import Router
from fleet_worker.settings import REGISTRY, Settings
from fleet_worker.terminal import printable

NODE_ANSWERS_WITHIN = 2.0
"""Seconds that a node has to answer."""
HOST_ANSWERS_WITHIN = 1.5
"""Seconds that all nodes of a host have to answer: their number is unknown, so this is always waited for."""
MOST_NODES = 10_000
"""Answers of the nodes of hosts that are read in that time."""


class NodeControl:
    """Finds and tells nodes. Their names are as in `local@mini-7`, hosts as in `mini-7`.

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

    def tell(self, command: str, nodes: Sequence[str]) -> dict[str, Any]:
        """Send a control command to these nodes, and return what those replied that answered in time, by name."""
        if not nodes:
            return {}
        return self._broadcast(command, destination=list(nodes), limit=len(nodes), timeout=NODE_ANSWERS_WITHIN)

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


def print_silent(names: Iterable[str], advice: str) -> None:
    """Print an error for each node and each host that did not answer; `advice` is for a node."""
    for name in map(printable, names):
        what = f"{name} does not answer: {advice}"
        if "@" not in name:
            what = f"{name} is no host that answers: does it run, and use this broker? A node is named {name}@HOST."
        click.echo(f"fleet-worker: {what} fleet-worker status shows all nodes", err=True)
