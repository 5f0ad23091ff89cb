"""`fleet-worker restart`: restart nodes, or their MLX servers, one after the other, so that no request fails."""

from __future__ import annotations

import time
from collections.abc import Sequence

import click

from fleet_worker import exit_codes
from fleet_worker.errors import BrokerUnavailable
from fleet_worker.ops.restart_control import RestartControl
from fleet_worker.ops.rolling_restart import RegistryView, RollingRestart
from fleet_worker.registry.view import ALL_ANSWERS_WITHIN
from fleet_worker.router.router import Router
from fleet_worker.settings import Settings
from fleet_worker.terminal import printable

NODE_WITHIN, SERVER_WITHIN = 120.0, 900.0
"""Seconds in which a node, or a server, comes back after the grace of its requests."""


def restart(settings: Settings, names: Sequence[str], *, server: bool, timeout: float | None = None) -> int:
    """Restart nodes, or their MLX servers, print a line for each, and return the exit code.

    Each has `timeout` seconds to come back. A name is that of a node, of a host, or of an instance of this host.
    """
    control = RestartControl(settings, server=server)
    names = [each for name in names for each in _resolved(name, settings)]
    with Router(settings, patient=False) as router:
        try:
            view, nodes = RegistryView(router.registry), control.find(names)
        except BrokerUnavailable as error:
            return _restart_here(control, names, error)
        return RollingRestart(control, view, _within(timeout, server)).run(nodes)


def restart_all(settings: Settings, *, server: bool, timeout: float | None = None) -> int:
    """Restart all nodes of the fleet, or their MLX servers, as `restart` does. Those that take no work are left out."""
    control = RestartControl(settings, server=server)
    with Router(settings, patient=False) as router:
        view = RegistryView(router.registry)
        time.sleep(ALL_ANSWERS_WITHIN)
        if nodes := view.nodes():
            return RollingRestart(control, view, _within(timeout, server)).run(nodes, only_available=True)
    click.echo("fleet-worker: no registry node answers, so no node is known: name the nodes", err=True)
    return exit_codes.UNAVAILABLE


def _restart_here(control: RestartControl, names: Sequence[str], away: BrokerUnavailable) -> int:
    """While the broker is away: have the `up` of this host restart its nodes. Raises the error if others are named, or
    if no `up` answers."""
    if not all(control.is_here(name) for name in names):
        raise away
    replies = [reply for name in names if (reply := control.ask_up(name))]
    if not replies:
        raise away
    for reply in replies:
        said = f"is not restarted: {reply.error}" if reply.error else "is restarted by fleet-worker up of this host"
        click.echo(printable(f"{reply.node} {said}; the broker is away, so nobody sees it come back"))
    return exit_codes.FAILED if any(reply.error for reply in replies) else 0


def _within(timeout: float | None, server: bool) -> float:
    return timeout if timeout is not None else SERVER_WITHIN if server else NODE_WITHIN


def _resolved(name: str, settings: Settings) -> list[str]:
    """Return the nodes of this host that a name without `@` means here, or the name itself."""
    if name in settings.instances:
        return [f"{name}@{settings.host}"]
    here = [each for each, instance in settings.instances.items() if instance.opted_in]
    return [f"{each}@{settings.host}" for each in here] if here and name == settings.host else [name]
