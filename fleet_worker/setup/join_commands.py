"""The commands `quickstart`, `invite` and `join`. What is slow to import waits until one runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fleet_worker import config_file
from fleet_worker.errors import ConfigurationError
from fleet_worker.setup import options
from fleet_worker.setup.next_steps import check_all, command, finish


@click.command(short_help="Run a whole fleet on this Mac, for more to join.")
@options.model
@click.option("--simulated", is_flag=True, help="Try it with a simulated MLX server.")
@options.broker
@options.broker_ca
@options.address("Name or address of this Mac for others, as mini-1.local.")
@click.option("--local", is_flag=True, help="Only for this Mac: everything listens on loopback.")
def quickstart(
    model: str | None, simulated: bool, broker: str | None, broker_ca: Path | None, address: str, local: bool
) -> None:
    """Run a broker, a gateway and a node for each MLX server of this Mac, and print how to use it.

    The first time it writes ~/fleet/worker.toml (or --config FILE) and a first key; the options are for this. Later it
    goes on with these files. Ctrl-C ends all of it. It is `fleet-worker up` with what it prints at first, so
    `fleet-worker service install` makes it start by itself.
    """
    from fleet_worker.setup import worker_file
    from fleet_worker.setup.quickstart import Choices, quickstart

    if local and (address or broker):
        raise click.UsageError("--local has neither an address nor a broker of its own")
    choices = Choices(options.given_broker(broker), broker_ca, address, local, simulated, model)
    sys.exit(quickstart(worker_file.place(None), choices))


@click.command(short_help="Print a line with which another Mac joins.")
@click.option("--role", type=click.Choice(["mini", "router"]), default="mini", show_default=True)
@options.address("Name or address of the broker for the other host.")
@click.option("--account", is_flag=True, help="Read the broker's account for it, USER:PASSWORD, from standard input.")
def invite(role: Any, address: str, account: bool) -> None:
    """Print one line for a Mac that is to join this fleet. It can be used once, within ten minutes.

    It has the address of the broker, its CA, and a secret for which the broker gives its account. A broker that cannot
    do that (RabbitMQ, or one where this host may not make accounts) leaves the account in the line itself.
    """
    from fleet_worker.settings import Settings
    from fleet_worker.setup.invite import invite, join_line, validity

    named = options.given("-") if account else ""
    if account and not named.partition(":")[2]:
        raise click.UsageError("--account reads USER:PASSWORD from standard input")
    made = invite(Settings(), role, address=address, account=named)
    click.echo(join_line(made, role))
    click.echo(f"fleet-worker: for the other host, after fleet-worker is installed there {validity(made)}", err=True)


@click.command(short_help="Make this Mac a part of a fleet.")
@click.argument("line", nargs=-1)
@click.option("--up", "run_it", is_flag=True, help="Then run `fleet-worker up` in this terminal.")
@options.service
@options.yes
@options.output
@options.force
@options.host
@options.model
@click.option(
    "--broker-cert", type=options.PEM_FILE, help="PEM file of a client certificate, if the broker asks for it."
)
@click.option("--broker-key", type=options.PEM_FILE, help="PEM file of its private key.")
def join(
    line: tuple[str, ...],
    run_it: bool,
    service: bool | None,
    yes: bool,
    output: str | None,
    model: str | None,
    **known: Any,
) -> None:
    """Join the fleet that printed LINE by `fleet-worker invite`. `-` reads the line from standard input.

    Writes worker.toml, which only you can read, with the MLX servers that run here, or else with a model of the local
    Hugging Face cache that fits. Then checks everything, as `fleet-worker doctor` does; the exit code is 1 if that
    finds an error, and the file stays. Without LINE it goes on with the file of an earlier try that has found no
    server.
    """
    from fleet_worker.setup import worker_file

    path = worker_file.place(output)
    if line:
        _use_invitation(options.given(" ".join(line)), path, **known)
    elif not path.exists():
        raise click.UsageError("LINE is missing: fleet-worker invite prints it, on the first Mac of the fleet")
    config_file.use(str(path))
    _find_instances(path, model)
    if run_it and not service:
        check_all()
        sys.exit(_run_up())
    finish(path, service=service, asks=sys.stdin.isatty() and not yes)


def _use_invitation(
    line: str, path: Path, *, force: bool, host: str | None, broker_cert: Path | None, broker_key: Path | None
) -> None:
    from fleet_worker.broker.faults import place_of
    from fleet_worker.setup.join import join
    from fleet_worker.setup.worker_file import WorkerFile

    file = WorkerFile("", host, broker_cert=broker_cert, broker_key=broker_key)
    membership, name = join(line, path, file, force=force)
    click.echo(f"{name} belongs to the fleet at {place_of(membership.broker_url)}: {path} was written.")
    if membership.role == "router":
        click.echo("A router of this host reads that file. Try: fleet-worker status, or fleet-worker gateway")
        sys.exit(0)


def _find_instances(path: Path, model: str | None) -> None:
    """Write the instances of this host into the file that has none yet."""
    from fleet_worker.settings import Settings
    from fleet_worker.setup.instances import described, local_instances
    from fleet_worker.setup.worker_file import add_instances
    from fleet_worker.terminal import printable

    if Settings().instances:
        raise ConfigurationError(f"{path} has its instances already: fleet-worker init writes a new file")
    try:
        found = local_instances(model)
    except ConfigurationError as error:
        again = command("join", path)
        text = f"{error.message}\n\nThe account of the fleet is kept in {path}; then go on by: {again}"
        raise ConfigurationError(text) from None
    add_instances(path, found)
    for name, instance in found.items():
        click.echo(f"{name}: {printable(described(instance))}")


def _run_up() -> int:
    from fleet_worker.settings import Settings
    from fleet_worker.setup.foreground import run_up

    return run_up(Settings())


COMMANDS = (quickstart, invite, join)
