"""The commands of this room, for the command line."""

from __future__ import annotations

from fleet_worker.setup.config_commands import config
from fleet_worker.setup.service_commands import service

COMMANDS = (
    config,
    service,
)
