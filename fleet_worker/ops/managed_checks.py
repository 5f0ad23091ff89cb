"""Checks of an MLX server that `fleet-worker up` runs."""

from __future__ import annotations

from collections.abc import Iterator

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.file_lock import holder
from fleet_worker.host.servers import port_owner
from fleet_worker.host.servers.custody import Custody
from fleet_worker.host.servers.server_command import ServerCommand
from fleet_worker.host.up_socket import lock_path
from fleet_worker.ops.findings import Finding
from fleet_worker.settings import Settings


def start_problems(settings: Settings, name: str) -> Iterator[Finding]:
    """Tell what keeps the server of an instance with `serve` from starting."""
    command = ServerCommand.of(settings.instances[name])
    try:
        command.located()
    except ConfigurationError as error:
        yield Finding("error", error.message, "correct serve, then reload")
    if port_owner.is_taken(command.host, command.port):
        owner = port_owner.owner(command.port)
        if not owner or not Custody.of(settings, name).owns(owner):
            found = (
                f"port {command.port} is in use by {port_owner.described(owner)}, which fleet-worker up does not run"
            )
            yield Finding("error", found, "end that, set another base_url, or remove serve: it is never fought")


def silent_server(settings: Settings, name: str, silent: str) -> Iterator[Finding]:
    """Tell whether a server that can start will; `silent` is how it does not answer."""
    command = ServerCommand.of(settings.instances[name])
    wanted = settings.availability
    up = holder(lock_path(settings.state_dir, settings.host))
    if up and wanted.in_use and wanted.stop_servers:
        advice = f"if fleet-worker status shows no `away` here, the log of fleet-worker up, pid {up}, tells why"
        yield Finding("warning", f"{silent}: it is stopped while this host is away", advice)
    elif up:
        yield Finding("error", silent, f"fleet-worker up, pid {up}, runs it: its log tells why, or that it loads")
    else:
        yield Finding("ok", f"fleet-worker up will start {command.program} on port {command.port}")
