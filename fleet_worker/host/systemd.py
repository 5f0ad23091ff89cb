"""`fleet-worker up` as a user unit or a system unit of systemd, on Linux."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from fleet_worker.errors import ConfigurationError
from fleet_worker.host import service_files
from fleet_worker.host.account import Account
from fleet_worker.host.service_files import ANSWER_WITHIN, check, checked_path, run

UNIT = "fleet-worker.service"
SYSTEM_UNITS = Path("/etc/systemd/system")
_TEXT = """\
[Unit]
Description=fleet-worker: the MLX servers of this host as nodes of the fleet
{of_system}
[Service]
Type=exec
{user}Environment={variable}
# The colon: no $NAME in it is a variable.
ExecStart=:{command}
Restart=always
RestartSec=5
# A wrong configuration stays wrong until somebody changes it.
RestartPreventExitStatus=78
# SIGTERM for `fleet-worker up` alone, which ends its nodes; SIGKILL for all that is left.
KillMode=mixed
TimeoutStopSec={stop_timeout}
LimitNOFILE={open_files}

[Install]
WantedBy={target}
"""


_AFTER_NETWORK = """\
Wants=network-online.target
After=network-online.target
"""


def _quoted(word: str) -> str:
    """Return one word for systemd, which expands a % also in quotes."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


class Systemd:
    """A unit of this user, or one of the system, which runs under an account. All methods but `text` and `problem`
    raise `FleetError` with the reason."""

    def __init__(self, ends_within: float, of_system: Account | None = None) -> None:
        self._ends_within = ends_within
        self._account = of_system
        self.is_of_system = of_system is not None
        self._stopped_within = service_files.stop_timeout(ends_within) + ANSWER_WITHIN
        self._systemctl = ("systemctl",) if of_system else ("systemctl", "--user")
        self.file = (SYSTEM_UNITS if of_system else _user_units()) / UNIT
        self.hints = (
            (f"Log: journalctl -u {UNIT} -f",)
            if of_system
            else (
                "It ends when you log out and does not start at boot, unless you run once: loginctl enable-linger",
                "Or it runs as a service of the system: fleet-worker service install --system",
                f"Log: journalctl --user -u {UNIT} -f",
            )
        )

    def text(self, config: Path) -> str:
        """Return the content of the file; raises `ConfigurationError` for a path that it cannot hold."""
        if re.search(r"""["'\\]""", sys.executable):
            problem = "systemd starts no program that has quotes or backslashes in its path"
            raise ConfigurationError(f"{problem}: {sys.executable}")
        return _TEXT.format(
            of_system=_AFTER_NETWORK if self._account else "",
            user=f"User={self._account.name}\n" if self._account else "",
            target="multi-user.target" if self._account else "default.target",
            variable=_quoted(f"FLEET_CONFIG={checked_path(str(config))}"),
            command=" ".join([_quoted(checked_path(sys.executable)), *service_files.UP]),
            stop_timeout=service_files.stop_timeout(self._ends_within),
            open_files=service_files.OPEN_FILES,
        )

    def problem(self, *, changes: bool = True) -> str | None:
        """Return why systemd cannot be used here, at all or to change something; or None."""
        if not shutil.which("systemctl"):
            return "there is no systemctl on the PATH"
        if self.is_of_system and changes and (problem := service_files.needs_root()):
            return problem
        done = run(*self._systemctl, "show-environment")
        if done.returncode:
            advice = "" if self.is_of_system else "; log in as this user itself, not by su or sudo, or add --system"
            return f"{service_files.failure(done)}{advice}"
        return None

    def install(self, text: str) -> None:
        """Write the file and start the unit. A unit that runs already ends first, as by SIGTERM."""
        service_files.write(self.file, text)
        check(run(*self._systemctl, "daemon-reload"))
        check(run(*self._systemctl, "enable", UNIT))
        # `enable --now` would not restart a unit that runs.
        check(run(*self._systemctl, "restart", UNIT, within=self._stopped_within))

    def uninstall(self) -> bool:
        """End the unit and remove the file; return False if there was none."""
        if not self.file.exists():
            return False
        check(run(*self._systemctl, "disable", "--now", UNIT, within=self._stopped_within))
        self.file.unlink(missing_ok=True)
        check(run(*self._systemctl, "daemon-reload"))
        return True

    def status(self) -> tuple[bool, str]:
        """Return whether it runs, and what systemd prints about it."""
        done = run(*self._systemctl, "--no-pager", "status", UNIT)
        return not done.returncode, (done.stdout or done.stderr).rstrip()


def _user_units() -> Path:
    given = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(given) if given.startswith("/") else Path.home() / ".config"  # as systemd reads it
    return folder / "systemd" / "user"
