"""What `init` and `join` do when the file is written: check everything, and start it or say how."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NoReturn

import click

from fleet_worker import config_file, exit_codes
from fleet_worker.setup.service_commands import install_service


def finish(path: Path, *, service: bool | None, asks: bool) -> NoReturn:
    """Check everything; then install the service if that is wanted (None: not said, so ask, if `asks`), or print what
    comes next. Ends the command that is running, with the exit code of `check_all` if nothing else fails."""
    code = check_all()
    if service or (service is None and asks and click.confirm("Run it as a service, from now on?")):
        click.get_current_context().invoke(install_service)
    else:
        _print_next(path)
    sys.exit(code)


def _print_next(path: Path) -> None:
    lines = {"doctor": "what is wrong here", "up": "run it in this terminal", "service install": "or for good"}
    commands = {command(each, path): why for each, why in lines.items()}
    width = max(map(len, commands))
    click.echo("\n".join(["Next:", *(f"  {each:{width}}  # {why}" for each, why in commands.items())]))


def check_all() -> int:
    """Print what `doctor` finds wrong, as long as nothing runs; return FAILED if an error is among it, or else 0.

    A warning is no failure: that a laptop goes to sleep must not end a script.
    """
    from fleet_worker.ops.doctor import examine
    from fleet_worker.ops.findings import show

    findings = [found for found in examine(fleet=False) if found.severity != "ok"]
    if findings:
        show(findings)
    else:
        click.echo("fleet-worker doctor has found nothing wrong.")
    return exit_codes.FAILED if any(found.severity == "error" for found in findings) else 0


def command(words: str, path: Path) -> str:
    """Return a command line for this file; only the default one need not be named."""
    is_default = path == config_file.DEFAULT.expanduser()
    return f"fleet-worker {words}" + ("" if is_default else f" --config {shlex.quote(str(path))}")
