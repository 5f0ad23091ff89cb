"""The commands of this room, for the command line."""

from __future__ import annotations

from fleet_worker.setup.config_commands import config
from fleet_worker.setup.init_command import init
from fleet_worker.setup.join_commands import COMMANDS as OF_FLEET
from fleet_worker.setup.service_commands import service

COMMANDS = (*OF_FLEET, init, config, service)
