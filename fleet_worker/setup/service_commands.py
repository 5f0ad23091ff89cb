"""`fleet-worker service`: `fleet-worker up` as a service. What is slow to import waits until a command runs."""

from __future__ import annotations

import sys

import click

from fleet_worker import exit_codes


@click.group(short_help="Run `fleet-worker up` as a service of this user.")
def service() -> None:
    """Run `fleet-worker up` as a service of this user: by launchd on macOS, by systemd on Linux."""


@service.command("install")
@click.option("--print", "only_print", is_flag=True, help="Only print the file, and install nothing.")
def install_service(only_print: bool) -> None:
    """Write the file of the service and start it. If it is installed already, restart it.

    --config or FLEET_CONFIG must name a file with all settings: the service gets no other variable of this shell.
    """
    from fleet_worker.host.service import configuration, service_manager

    config, left_out, ends_within = configuration()
    manager = service_manager(ends_within)
    text = manager.text(config)
    if left_out:
        advice = f"write these settings to {config} instead, and chmod 600 that file"
        click.echo(f"fleet-worker: the service does not get {', '.join(left_out)}: {advice}", err=True)
    problem = None if only_print else manager.problem()
    if only_print or problem:
        click.echo(text, nl=False)
        if problem:
            click.echo(f"fleet-worker: nothing was installed: {problem}", err=True)
        click.echo(f"fleet-worker: this text belongs in {manager.file}", err=True)
        sys.exit(exit_codes.UNAVAILABLE if problem else 0)
    manager.install(text)
    click.echo("\n".join([f"Installed and started: {manager.file}", *manager.hints]))


@service.command("uninstall")
def uninstall_service() -> None:
    """Stop the service, as SIGTERM does, and remove its file."""
    from fleet_worker.host.service import service_manager

    manager = service_manager()
    if (problem := manager.problem()) and manager.file.exists():
        click.echo(f"fleet-worker: {manager.file} is still there: {problem}", err=True)
        sys.exit(exit_codes.UNAVAILABLE)
    removed = not problem and manager.uninstall()
    click.echo(f"Stopped and removed: {manager.file}" if removed else "The service is not installed.")


@service.command("status")
def service_status() -> None:
    """Tell whether the service runs: exit code 0 if it does, 3 if not, 69 if that cannot be known."""
    from fleet_worker.host.service import service_manager

    manager = service_manager()
    if problem := manager.problem():
        click.echo(f"fleet-worker: {problem}", err=True)
        sys.exit(exit_codes.UNAVAILABLE)
    running, text = manager.status()
    click.echo(text)
    sys.exit(0 if running else exit_codes.NOT_RUNNING)
