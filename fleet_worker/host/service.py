"""`fleet-worker up` as a service: of this user, which is an agent of launchd on macOS and a user unit of systemd on
Linux; or of the system, which is a daemon or a system unit, and runs under the account of a person."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from fleet_worker.config_file import DEFAULT, config_path
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.account import ROOT, Account, account
from fleet_worker.host.launchd import Launchd
from fleet_worker.host.service_files import ENDS_WITHIN
from fleet_worker.host.systemd import Systemd
from fleet_worker.host.up.programs import ends_within
from fleet_worker.settings import Settings


def configuration() -> tuple[Path, list[str], float]:
    """Return the absolute path that FLEET_CONFIG names, the names of the FLEET_* variables that the service will not
    get, and the seconds that all of it may take to end.

    Raises:
        ConfigurationError: FLEET_CONFIG is not set, or its file alone is not a valid configuration.
    """
    path = config_path()
    if not path:
        raise ConfigurationError(
            f"FLEET_CONFIG is not set, and there is no {DEFAULT}: a service needs a file: --config FILE"
        )
    settings = _SettingsOfFile()
    left_out = [name for name in os.environ if name.upper().startswith("FLEET_") and name != "FLEET_CONFIG"]
    return path.absolute(), sorted(left_out), ends_within(settings)


class _SettingsOfFile(Settings):
    """Settings without the variables of this shell. The service has none of them: its file must not hold a secret."""

    @classmethod
    def settings_customise_sources(cls, *args: Any, **sources: Any) -> Any:
        arguments, _variables, file = super().settings_customise_sources(*args, **sources)
        return arguments, file


def service_manager(ends_within: float = ENDS_WITHIN, of_system: Account | None = None) -> Launchd | Systemd:
    """Return the manager whose command exists. Without any, return that of the platform, to show its file.

    With an account, its service is one of the whole system.
    """
    if shutil.which("launchctl") or (sys.platform == "darwin" and not shutil.which("systemctl")):
        return Launchd(ends_within, of_system)
    return Systemd(ends_within, of_system)


def installed() -> Launchd | Systemd:
    """Return the manager of the service that is installed, of the system or of this user; without any, of this user."""
    of_system = service_manager(of_system=account(ROOT))  # any account: no file is written
    return of_system if of_system.file.exists() else service_manager()


def conflict(manager: Launchd | Systemd) -> str | None:
    """Return why this service cannot be installed beside one of the other kind, or None."""
    other = service_manager(of_system=None if manager.is_of_system else account(ROOT))
    if not other.file.exists():
        return None
    kind = "the system" if other.is_of_system else "this user"
    return f"it is installed as a service of {kind} already, by {other.file}: fleet-worker service uninstall first"


def act_for(person: Account) -> None:
    """Make the home of this person the one that is meant by `~`, and the default file there the one that counts.

    By sudo, HOME may be that of root.
    """
    os.environ["HOME"] = str(person.home)
    default = DEFAULT.expanduser()
    if not config_path() and default.is_file():
        os.environ["FLEET_CONFIG"] = str(default)
