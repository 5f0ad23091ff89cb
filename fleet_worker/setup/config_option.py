"""The option `--config FILE` of every command. It may stand behind `fleet-worker` too; the last one counts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from fleet_worker import config_file

WRITES_FILE = {"init", "join", "quickstart"}
"""The commands that make the file: for them it need not exist."""
READS_NONE = {"demo"}
"""The commands that read no file unless one is named."""
_GIVEN = "fleet_worker.config"


def add_to(command: click.Command) -> None:
    """Give the option to a command, and to all commands of a group."""
    text = "The configuration file. Default: what FLEET_CONFIG names, or else ~/fleet/worker.toml if it exists."
    command.params.append(click.Option(["--config"], metavar="FILE", expose_value=False, callback=_remember, help=text))
    if isinstance(command, click.Group):
        for each in command.commands.values():
            add_to(each)
    elif command.callback:
        exists, default = command.name not in WRITES_FILE, command.name not in READS_NONE
        command.callback = _with_file(command.callback, exists=exists, default=default)


def _remember(ctx: click.Context, param: click.Parameter, name: str | None) -> None:
    """Nothing more, since a command line may be parsed without being run."""
    if name == "":
        raise click.BadParameter("it takes the name of a file", ctx, param)
    if name is not None:
        ctx.meta[_GIVEN] = name  # one dictionary for a command and its groups


def _with_file(callback: Callable[..., Any], *, exists: bool, default: bool) -> Callable[..., Any]:
    @functools.wraps(callback)
    def run(*arguments: Any, **options: Any) -> Any:
        name = click.get_current_context().meta.get(_GIVEN)
        if name is not None:
            config_file.use(name, exists=exists)
        elif default:
            config_file.use_default()
        return callback(*arguments, **options)

    return run
