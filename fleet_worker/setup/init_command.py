"""`fleet-worker init`: asks what it cannot find out, and writes worker.toml."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleet_worker import config_file, urls
from fleet_worker.errors import ConfigurationError
from fleet_worker.setup import options
from fleet_worker.setup.next_steps import finish

if TYPE_CHECKING:
    from fleet_worker.setup.local_models import LocalModel
    from fleet_worker.setup.worker_file import WorkerInstance

_NO_TERMINAL = (
    "there is no terminal to ask at: add --yes, and --broker URL; --server URL, --model NAME or --serve COMMAND "
    "if what runs here is not meant"
)


@click.command(short_help="Write worker.toml for this Mac.")
@options.broker
@options.broker_ca
@options.host
@click.option("--server", metavar="URL", help="An MLX server that runs. Default: all that are found here.")
@click.option("--serve", metavar="COMMAND", help="The command line of a server for fleet-worker up to run.")
@options.model
@click.option("--name", metavar="NAME", help="Name of the instance. Default: local.")
@click.option("--concurrency", type=click.IntRange(1, 256), help="Requests at the same time.")
@options.output
@options.force
@options.yes
@options.service
def init(
    broker: str | None,
    broker_ca: Path | None,
    host: str | None,
    server: str | None,
    serve: str | None,
    model: str | None,
    name: str | None,
    concurrency: int | None,
    output: str | None,
    force: bool,
    yes: bool,
    service: bool | None,
) -> None:
    """Write the configuration of this Mac, which only you can read, and check it as fleet-worker doctor does.

    Finds the MLX servers that run here. Without any, it proposes a command line for one, with the largest model of the
    local Hugging Face cache that fits into memory: fleet-worker up then runs it. On a terminal it asks; each answer is
    an option, too. The exit code is 1 if the check finds an error; the file stays.

    \b
        fleet-worker init --broker redis://broker:6379/0 --yes
    """
    from fleet_worker.setup import worker_file

    if server and serve:
        raise click.UsageError("--server is one that runs, --serve starts one: give one of them")
    path = worker_file.place(output)
    worker_file.check_free(path, force=force)
    if not yes and not _is_terminal():
        raise click.UsageError(_NO_TERMINAL)
    if not broker and yes:
        raise click.UsageError("--broker URL is needed: --yes cannot find it out")
    broker = options.given_broker(broker) or _ask_broker()
    host = host or _host(asks=not yes)
    instances = _instances(server, serve, model, asks=not yes)
    instances = _adjusted(instances, name, concurrency)
    text = worker_file.WorkerFile(broker, host, broker_ca, instances=instances).text()
    worker_file.check_text(text)
    worker_file.write(path, text, force=force)
    click.echo(f"{path} was written.")
    config_file.use(str(path))
    finish(path, service=service, asks=not yes)


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _ask_broker() -> str:
    return str(click.prompt("URL of the broker, as redis://:PASSWORD@mini-1:6379/0", value_proc=options.checked_broker))


def _host(*, asks: bool) -> str:
    from fleet_worker.settings import as_host
    from fleet_worker.setup.own_names import own_host

    own = own_host()
    return as_host(str(click.prompt("Name of this Mac in the fleet", default=own))) if asks else own


def _instances(server: str | None, serve: str | None, model: str | None, *, asks: bool) -> dict[str, WorkerInstance]:
    from fleet_worker.setup.instances import named, of_command, of_url

    if serve:
        return named([of_command(serve, model)])
    if server:
        try:
            server = urls.server_url(server)
        except ValueError as error:
            raise click.BadParameter(f"it {error}", param_hint="'--server'") from None
        return named([of_url(server, model)])
    return _ask_instances(model) if asks else _found(model)


def _found(model: str | None) -> dict[str, WorkerInstance]:
    from fleet_worker.setup.instances import described, local_instances
    from fleet_worker.terminal import printable

    try:
        found = local_instances(model)
    except ConfigurationError as error:
        advice = "Or name another one: --server URL, --serve COMMAND"
        raise ConfigurationError(f"{error.message}\n\n{advice}") from None
    for name, instance in found.items():
        click.echo(f"{name}: {printable(described(instance))}")
    return found


def _ask_instances(model: str | None) -> dict[str, WorkerInstance]:
    from fleet_worker.setup.instances import has_program, named, of_server, serving, with_free_port
    from fleet_worker.setup.local_models import local_models
    from fleet_worker.setup.local_servers import local_servers
    from fleet_worker.terminal import printable

    chosen: list[WorkerInstance] = []
    servers = local_servers()
    for server in servers:
        listed = printable(server.started_with or ", ".join(server.models[:5]) or "it does not say which models")
        if click.confirm(f"An MLX server ({server.kind}) runs at {server.url}: {listed}. Serve it?", default=True):
            given = model or ("" if of_server(server) else str(click.prompt("The model that it was started with")))
            chosen += filter(None, [of_server(server, given or None)])
    if chosen or servers:
        return named(chosen)
    if not has_program() and not model:
        return _found(model)
    return named([with_free_port(serving(model or _ask_model(local_models())))])


def _ask_model(models: list[LocalModel]) -> str:
    from fleet_worker.setup.instances import memory
    from fleet_worker.setup.local_models import that_fits
    from fleet_worker.terminal import printable

    click.echo("No MLX server runs here. fleet-worker up can run one; chat models in the Hugging Face cache:")
    for each in models:
        if each.kind == "chat":
            click.echo(f"  {printable(each.name)}    {each.size / 1e9:.1f} GB")
    proposed = that_fits(models, memory())
    return str(click.prompt("Model to serve", default=proposed.name if proposed else None))


def _adjusted(
    instances: dict[str, WorkerInstance], name: str | None, concurrency: int | None
) -> dict[str, WorkerInstance]:
    if concurrency:
        instances = {each: replace(instance, concurrency=concurrency) for each, instance in instances.items()}
    if name and len(instances) != 1:
        raise click.UsageError(f"--name is for one instance, and there are {len(instances)}: choose it by --server URL")
    return {name: next(iter(instances.values()))} if name else instances
