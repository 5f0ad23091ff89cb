"""`fleet-worker config`: an example, a check, and what is in force. What is slow to import waits until one runs."""

from __future__ import annotations

import sys

import click

from fleet_worker import config_file, exit_codes


@click.group(short_help="Show an example, check a file, show what is in force.")
def config() -> None:
    """Show an example of a configuration, check one, and show what is in force."""


@config.command()
@click.argument("name", type=click.Choice(["worker", "router"]), default="worker")
def example(name: str) -> None:
    """Print a file with all settings, explained: for a Mac with MLX servers, or for a router and the gateway.

    \b
        fleet-worker config example > worker.toml
    """
    from importlib.resources import files

    # Links to the folder config/ of the project; in the wheel they are files.
    text = (files("fleet_worker.setup") / "examples" / f"{name}.toml").read_text("utf-8")
    click.echo(text, nl=False)


@config.command()
@click.argument("file", required=False)
def check(file: str | None) -> None:
    """Check FILE, or else the configuration that commands here have, FLEET_* variables included.

    Prints all faults, or ok and what would run. Broker and servers are not asked: fleet-worker doctor does that.
    The exit code is 0 if it can be used, and 78 if not.
    """
    from fleet_worker.setup.config_check import check
    from fleet_worker.terminal import printable

    if file:
        config_file.use(file)
    result = check()
    for fault in result.faults:
        click.echo(f"fault    {printable(fault)}", err=True)
    for warning in result.warnings:
        click.echo(f"warning  {printable(warning)}", err=True)
    if result.faults:
        sys.exit(exit_codes.CONFIGURATION)
    click.echo("ok")
    for name, text in result.would_run:
        click.echo(f"{name}: {printable(text)}")


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def show(as_json: bool) -> None:
    """Print the settings in force here as TOML, and where each comes from: the file, a variable, or the default.

    Passwords and keys are shown as (set).
    """
    from fleet_worker.settings import Settings
    from fleet_worker.setup import config_show

    found = config_show.entries(Settings())
    click.echo(config_show.as_json(found) if as_json else config_show.as_toml(found), nl=as_json)
