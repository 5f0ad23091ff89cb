"""`fleet-worker up` as a service of this user: an agent of launchd on macOS, a user unit of systemd on Linux."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.launchd import Launchd
from fleet_worker.host.service_files import (
    ENDS_WITHIN,
)
from fleet_worker.host.systemd import Systemd
from fleet_worker.settings import Settings


def configuration() -> tuple[Path, list[str], float]:
    """Return the absolute path that FLEET_CONFIG names, the FLEET_* variables that the service will not have, and the
    seconds that its nodes may take to end.

    Raises:
        ConfigurationError: it is not set, or that file alone is no valid configuration.
    """
    name = os.environ.get("FLEET_CONFIG")
    if not name:
        raise ConfigurationError("FLEET_CONFIG is not set: a service needs a file, as FLEET_CONFIG=worker.toml")
    settings = _AsTheService()
    left_out = [each for each in os.environ if each.upper().startswith("FLEET_") and each != "FLEET_CONFIG"]
    return Path(name).expanduser().absolute(), sorted(left_out), settings.worker.killed_after


class _AsTheService(Settings):
    """Without the variables of this shell: the service has none of them, since its file is no place for a secret."""

    @classmethod
    def settings_customise_sources(cls, *args: Any, **kwargs: Any) -> Any:
        arguments, _variables, file = super().settings_customise_sources(*args, **kwargs)
        return arguments, file


def service_manager(ends_within: float = ENDS_WITHIN) -> Launchd | Systemd:
    """The one whose command is there; without any, the one of this platform, which can still say what it would do."""
    if shutil.which("launchctl") or (sys.platform == "darwin" and not shutil.which("systemctl")):
        return Launchd(ends_within)
    return Systemd(ends_within)
