"""The commands of the gateway: `fleet-worker gateway`, `keys`, `usage`. What is slow to import waits until one runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from fleet_worker.errors import ConfigurationError


@click.command(short_help="Serve OpenAI, Anthropic and Ollama clients over HTTP.")
def gateway() -> None:
    """Serve OpenAI, Anthropic and Ollama clients over HTTP, in front of the whole fleet.

    The address and all else are settings, in the section [gateway] of the configuration file; by default
    http://127.0.0.1:4000. SIGTERM and Ctrl-C let running requests end. SIGHUP reads the file of keys again.
    """
    from fleet_worker.host.lossy_output import lose_what_cannot_be_written
    from fleet_worker.settings import Settings

    try:
        from fleet_worker.gateway.serve import serve
    except ModuleNotFoundError as error:
        text = f"the gateway needs {error.name}: in a checkout, pip install '.[gateway]'"
        raise ConfigurationError(text) from None
    lose_what_cannot_be_written()
    form = "[%(asctime)s: %(levelname)s/gateway] %(message)s"
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=form)
    serve(Settings())


@click.group()
def keys() -> None:
    """Make keys for callers of the gateway."""


@keys.command("new", short_help="Make a key, and print it once.")
@click.argument("name")
def new_key(name: str) -> None:
    """Make a key, and print it on standard error, and on standard output the table for the file of keys.

    NAME is who the key is for: it stands in the ledger, in metrics and in logs. The file of keys is the one that
    gateway.keys names, so this adds a key to it:

    \b
        fleet-worker keys new alice >> keys.toml

    It holds the hash of the key only. The key itself is nowhere else: give it to its owner now.
    """
    from fleet_worker.gateway.accounts import keys

    made = keys.new_key(name)
    click.echo(made.table)
    click.echo(f"fleet-worker: the key of {name}, which is shown only now:\n\n{made.secret}\n", err=True)
    click.echo(
        "fleet-worker: the table belongs in the file that gateway.keys names (chmod 600).\n"
        "A gateway that fleet-worker up runs reads it again after fleet-worker reload,\n"
        "any other at SIGHUP. What the table may have besides: models, aliases,\n"
        "fallbacks, rpm, tpm, max_parallel, budget_per_day, expires, cache_scope,\n"
        "keep_warm and others, which the gateway's manual lists.",
        err=True,
    )


def _moment(ctx: click.Context, param: click.Parameter, text: str) -> float:
    from fleet_worker.gateway.accounts.usage import moment

    try:
        return moment(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


@click.command(short_help="Show who used how many tokens.")
@click.argument("ledgers", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--by", type=click.Choice(["key", "tag", "model", "node"]), default="key", show_default=True)
@click.option("--since", callback=_moment, default="7d", show_default=True, help="As 7d, 24h, 30m, or a date in UTC.")
@click.option("--key", help="Only what this key has used.")
@click.option("--json", "form", flag_value="json", help="Print a JSON object.")
@click.option("--csv", "form", flag_value="csv", help="Print CSV with a line of names.")
def usage(ledgers: tuple[Path, ...], by: Any, since: float, key: str | None, form: Any) -> None:
    """Show requests and tokens by key, tag, model or node, of the ledgers of all gateways of this host.

    LEDGERS are other files to read, as copies of those of other hosts. All that are given are taken together.
    """
    from fleet_worker.gateway.accounts.ledger_file import files_of, path_of
    from fleet_worker.gateway.accounts.usage import usage as used_by
    from fleet_worker.gateway.accounts.usage_listing import show
    from fleet_worker.settings import Settings

    files = ledgers or files_of(path_of(Settings()))
    if not files:
        text = "no gateway of this host has written a ledger; name the files of others: fleet-worker usage FILE..."
        raise ConfigurationError(text)
    show(used_by(files, by, since, key=key), by, since, form or "table")


COMMANDS = (gateway, keys, usage)
