"""`fleet-worker service`: `fleet-worker up` as a service. What is slow to import waits until a command runs."""

from __future__ import annotations

import sys

import click

from fleet_worker import exit_codes


@click.group(short_help="Run `fleet-worker up` as a service.")
def service() -> None:
    """Run `fleet-worker up` as a service: by launchd on macOS, by systemd on Linux."""


@service.command("install")
@click.option("--system", is_flag=True, help="Run it from the boot on, also if nobody is logged in. Needs sudo.")
@click.option("--user", metavar="NAME", help="With --system: the user that it runs as. Default: you, also by sudo.")
@click.option("--print", "only_print", is_flag=True, help="Only print the file, and install nothing.")
def install_service(system: bool, user: str | None, only_print: bool) -> None:
    """Write the file of the service and start it. If it is installed already, restart it.

    It runs while you are logged in; with --system always, under your account.

    --config or FLEET_CONFIG must name a file with all settings: the service gets no other variable of this shell.
    """
    from fleet_worker.host.account import account
    from fleet_worker.host.service import act_for, configuration, conflict, service_manager

    if user and not system:
        raise click.UsageError("--user is for a service of the system: add --system")
    of_system = account(user) if system else None
    if of_system:
        act_for(of_system)
    config, left_out, ends_within = configuration()
    manager = service_manager(ends_within, of_system)
    text = manager.text(config)
    if left_out:
        advice = f"write these settings to {config} instead, and chmod 600 that file"
        click.echo(f"fleet-worker: the service does not get {', '.join(left_out)}: {advice}", err=True)
    problem = None if only_print else manager.problem() or conflict(manager)
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
    """Stop the service, as SIGTERM does, and remove its file. One of the system needs sudo."""
    from fleet_worker.host.service import installed

    manager = installed()
    if (problem := manager.problem()) and manager.file.exists():
        click.echo(f"fleet-worker: {manager.file} is still there: {problem}", err=True)
        sys.exit(exit_codes.UNAVAILABLE)
    removed = not problem and manager.uninstall()
    click.echo(f"Stopped and removed: {manager.file}" if removed else "The service is not installed.")


@service.command("status")
def service_status() -> None:
    """Tell whether the service runs: exit code 0 if it does, 3 if not, 69 if that cannot be known."""
    from fleet_worker.host.service import installed

    manager = installed()
    if problem := manager.problem(changes=False):
        click.echo(f"fleet-worker: {problem}", err=True)
        sys.exit(exit_codes.UNAVAILABLE)
    running, text = manager.status()
    click.echo(text)
    sys.exit(0 if running else exit_codes.NOT_RUNNING)
