"""What `init` and `join` do when the file is written: check everything, and say what comes next."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from fleet_worker import config_file


def check_all() -> None:
    """Print what `doctor` finds wrong, as long as nothing runs."""
    from fleet_worker.ops.doctor import examine
    from fleet_worker.ops.findings import show

    findings = [found for found in examine(fleet=False) if found.severity != "ok"]
    if findings:
        show(findings)
    else:
        click.echo("fleet-worker doctor has found nothing wrong.")


def command(words: str, path: Path) -> str:
    """Return a command line for this file; only the default one need not be named."""
    is_default = path == config_file.DEFAULT.expanduser()
    return f"fleet-worker {words}" + ("" if is_default else f" --config {shlex.quote(str(path))}")
