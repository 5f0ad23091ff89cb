"""The commands of this room, for the command line."""

from __future__ import annotations

from fleet_worker.setup.service_commands import service

COMMANDS = (service,)
