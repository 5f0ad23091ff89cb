"""The commands of an operator, from `drain` to `status`. What is slow to import waits until one runs."""

from __future__ import annotations

import math
import sys

import click

from fleet_worker.seconds import Seconds


@click.command(short_help="Stop nodes from taking new work.")
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
@click.option(
    "--wait",
    "seconds",
    type=Seconds(min=0),
    is_flag=False,
    flag_value=math.inf,  # stands for the worker.drain_grace of each node
    metavar="[SECONDS]",
    help="Wait until no request runs there. After SECONDS, or worker.drain_grace of the node, others continue them.",
)
def drain(nodes: tuple[str, ...], seconds: float | None) -> None:
    """Stop nodes from taking new work, until `undrain` or their restart. Running requests continue.

    NODE is a node, as in local@mini-7, or a host, as in mini-7: all its inference nodes.
    The exit code is 69 if a node does not answer, and 1 if with --wait a node still has work in the end.
    """
    from fleet_worker.ops.drain import drain
    from fleet_worker.settings import Settings

    sys.exit(drain(Settings(), nodes, wait=seconds))


@click.command(short_help="Let drained nodes take work again.")
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
def undrain(nodes: tuple[str, ...]) -> None:
    """Let drained nodes take work again, once their MLX servers have proved that they work.

    NODE is as for drain. The exit code is 69 if a node does not answer, and 1 if it is shutting down.
    """
    from fleet_worker.ops.drain import undrain
    from fleet_worker.settings import Settings

    sys.exit(undrain(Settings(), nodes))


@click.command(short_help="Restart nodes, or their MLX servers, one after the other.")
@click.argument("nodes", metavar="[NODE...]", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All nodes of the fleet that take work.")
@click.option("--server", is_flag=True, help="Restart the MLX servers of the nodes, which fleet-worker up must manage.")
@click.option(
    "--timeout",
    type=Seconds(min=0, min_open=True),
    help="Seconds that each has to come back: 120, a server 900. The grace of its requests is added.",
)
def restart(nodes: tuple[str, ...], everything: bool, server: bool, timeout: float | None) -> None:
    """Restart nodes, or their MLX servers, one after the other. No request fails: others continue what is running.

    NODE is a node, as in local@mini-7, a host, as in mini-7 (all its inference nodes), or an instance of this host, as
    in local. The first node that does not come back ends the command, which tells what was not restarted.
    The exit code is 69 if a node does not answer, and 1 if one was not restarted, or is not back in time.
    """
    from fleet_worker.ops.restart import restart, restart_all
    from fleet_worker.settings import Settings

    if everything == bool(nodes):
        raise click.UsageError("name the nodes to restart, or give --all")
    if everything:
        sys.exit(restart_all(Settings(), server=server, timeout=timeout))
    sys.exit(restart(Settings(), nodes, server=server, timeout=timeout))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print each finding as a line of JSON.")
def doctor(as_json: bool) -> None:
    """Find what is wrong here, and tell what to do.

    Checks the configuration, the broker and its clock, the MLX servers, this machine, and the nodes of the fleet.
    The exit code is 0 without a finding, 1 after warnings, 2 after errors, 78 if the configuration cannot be used.
    """
    from fleet_worker.ops.doctor import examine
    from fleet_worker.ops.findings import exit_code, show

    findings = examine()
    show(findings, as_json=as_json)
    sys.exit(exit_code(findings))


@click.command(short_help="Show instances, models and waiting requests.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with the keys instances, models and lanes.")
@click.option(
    "--watch",
    "every",
    type=Seconds(min=0.1, max=86_400),
    is_flag=False,
    flag_value=2.0,
    metavar="[SECONDS]",
    help="Show it again every 2 seconds, or as often as given here, until Ctrl-C.",
)
def status(as_json: bool, every: float | None) -> None:
    """Show all instances of the fleet, their state, and the requests that wait in each lane.

    The registry node of each host reports them. A lane with waiting requests that no node serves is marked as
    NOBODY SERVES THIS. The lane of a single node is shown only if requests wait in it.
    """
    from fleet_worker.ops.status import show
    from fleet_worker.settings import Settings

    show(Settings(), as_json=as_json, every=every)


COMMANDS = (drain, undrain, restart, doctor, status)
