"""The options that several commands of this room have, so that one thing has one name in all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fleet_worker import urls

F = TypeVar("F", bound=Callable[..., Any])
MOST_INPUT = 100_000
"""Characters of standard input that are read."""
PEM_FILE = click.Path(path_type=Path, dir_okay=False, exists=True, resolve_path=True)


def given(text: str) -> str:
    """Return the text, or for `-` that of standard input; what is typed there is not shown."""
    if text != "-":
        return text
    if sys.stdin.isatty():
        return str(click.prompt("Paste it", hide_input=True, err=True)).strip()
    return sys.stdin.read(MOST_INPUT).strip()


def given_broker(url: str | None) -> str | None:
    """Return the URL of the option `--broker`, or for `-` that of standard input."""
    return checked_broker(given(url)) if url == "-" else url


def checked_broker(url: str) -> str:
    """Return a URL that was typed or read; raises `click.UsageError`, which does not show it."""
    try:
        return urls.broker_url(url)
    except ValueError as error:
        raise click.UsageError(f"the URL of the broker {error}") from None


def _check_broker(ctx: click.Context, param: click.Parameter, url: str | None) -> str | None:
    """`-` is read when the command runs: a command line may be parsed without being run."""
    if url in (None, "-"):
        return url
    try:
        return urls.broker_url(str(url))
    except ValueError as error:
        raise click.BadParameter(f"it {error}", ctx, param) from None


def _check_host(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    from fleet_worker.settings import as_host

    if name is not None and name != as_host(name):
        raise click.BadParameter("it has other characters than letters, digits, '-', '.' and '_'", ctx, param)
    return name


def _check_address(ctx: click.Context, param: click.Parameter, host: str) -> str:
    try:
        return host and urls.host_name(host)
    except ValueError as error:
        raise click.BadParameter(f"it {error}", ctx, param) from None


def address(help_text: str) -> Callable[[F], F]:
    """Return the option `--address`, whose meaning differs."""
    return click.option("--address", default="", metavar="NAME", callback=_check_address, help=help_text)


broker = click.option(
    "--broker", metavar="URL", callback=_check_broker, help="The broker; - reads the URL from standard input."
)
broker_ca = click.option("--broker-ca", type=PEM_FILE, help="PEM file of the CA that issued its certificate.")
host = click.option(
    "--host", metavar="NAME", callback=_check_host, help="Name of this Mac in the fleet. Default: its host name."
)
model = click.option("--model", metavar="NAME", help="The model of the MLX server that runs, or that is started.")
output = click.option("--output", metavar="FILE", help="The file to write. Default: --config, or ~/fleet/worker.toml.")
force = click.option("--force", is_flag=True, help="Replace the file if it exists.")
yes = click.option("--yes", is_flag=True, help="Ask nothing; take what is found here.")
service = click.option(
    "--service/--no-service", default=None, help="Then run fleet-worker service install, or do not ask about it."
)
