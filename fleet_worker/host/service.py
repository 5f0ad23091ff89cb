"""`fleet-worker up` as a service of this user: an agent of launchd on macOS, a user unit of systemd on Linux."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from fleet_worker.config_file import config_path
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.launchd import Launchd
from fleet_worker.host.programs import ends_within
from fleet_worker.host.service_files import ENDS_WITHIN
from fleet_worker.host.systemd import Systemd
from fleet_worker.settings import Settings


def configuration() -> tuple[Path, list[str], float]:
    """Return the absolute path that FLEET_CONFIG names, the names of the FLEET_* variables that the service will not
    get, and the seconds that all of it may take to end.

    Raises:
        ConfigurationError: FLEET_CONFIG is not set, or its file alone is not a valid configuration.
    """
    path = config_path()
    if not path:
        raise ConfigurationError("FLEET_CONFIG is not set: a service needs a file, as FLEET_CONFIG=worker.toml")
    settings = _SettingsOfFile()
    left_out = [name for name in os.environ if name.upper().startswith("FLEET_") and name != "FLEET_CONFIG"]
    return path.absolute(), sorted(left_out), ends_within(settings)


class _SettingsOfFile(Settings):
    """Settings without the variables of this shell. The service has none of them: its file must not hold a secret."""

    @classmethod
    def settings_customise_sources(cls, *args: Any, **sources: Any) -> Any:
        arguments, _variables, file = super().settings_customise_sources(*args, **sources)
        return arguments, file


def service_manager(ends_within: float = ENDS_WITHIN) -> Launchd | Systemd:
    """Return the manager whose command exists. Without any, return that of the platform, to show its file."""
    if shutil.which("launchctl") or (sys.platform == "darwin" and not shutil.which("systemctl")):
        return Launchd(ends_within)
    return Systemd(ends_within)
