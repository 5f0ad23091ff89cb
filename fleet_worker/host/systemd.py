"""`fleet-worker up` as a user unit of systemd, on Linux."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.service_files import (
    ANSWER_WITHIN,
    ENDS_WITHIN,
    OPEN_FILES,
    UP,
    _complaint,
    _failed,
    _plain,
    _run,
    _stop_within,
    _succeed,
    _write,
)

UNIT = "fleet-worker.service"


_UNIT = """\
[Unit]
Description=fleet-worker: the MLX servers of this host as nodes of the fleet

[Service]
Type=exec
Environment={variable}
# The colon: no $NAME in it is a variable.
ExecStart=:{command}
Restart=always
RestartSec=5
# A wrong configuration does not become right by itself.
RestartPreventExitStatus=78
# SIGTERM for `fleet-worker up` alone, which ends its nodes; SIGKILL for all that is left.
KillMode=mixed
TimeoutStopSec={stop_within}
LimitNOFILE={open_files}

[Install]
WantedBy=default.target
"""


def systemd_unit(config: Path, *, interpreter: str = sys.executable, ends_within: float = ENDS_WITHIN) -> str:
    """The text of the unit; raises `ConfigurationError` for a path that it cannot hold."""
    if re.search(r"""["'\\]""", interpreter):
        raise ConfigurationError(f"systemd starts no program that has quotes or backslashes in its path: {interpreter}")
    return _UNIT.format(
        variable=_quoted(f"FLEET_CONFIG={_plain(str(config))}"),
        command=" ".join([_quoted(_plain(interpreter)), *UP]),
        stop_within=_stop_within(ends_within),
        open_files=OPEN_FILES,
    )


def _quoted(word: str) -> str:
    """One word for systemd, where % begins a specifier also in quotes."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


class Systemd:
    """A user unit. Every method but `text` and `problem` raises `FleetError` with what went wrong."""

    hints = (
        "It ends when you log out and does not start at boot, unless you once say: loginctl enable-linger",
        f"Log: journalctl --user -u {UNIT} -f",
    )

    def __init__(self, ends_within: float) -> None:
        self._ends_within = ends_within
        given = os.environ.get("XDG_CONFIG_HOME", "")
        folder = Path(given) if given.startswith("/") else Path.home() / ".config"  # as systemd reads it
        self.file = folder / "systemd" / "user" / UNIT

    def text(self, config: Path) -> str:
        return systemd_unit(config, ends_within=self._ends_within)

    def problem(self) -> str | None:
        """Why it cannot be used here and now."""
        if not shutil.which("systemctl"):
            return "there is no systemctl on the PATH"
        done = _run("systemctl", "--user", "show-environment")
        if _failed(done):
            return f"{_complaint(done)}; log in as this user itself, not by su or sudo"
        return None

    def install(self, text: str) -> None:
        """Write the file and start the unit. One that runs already ends first, as by SIGTERM."""
        _write(self.file, text)
        _succeed("systemctl", "--user", "daemon-reload")
        _succeed("systemctl", "--user", "enable", UNIT)
        # Where --now of `enable` would leave a running one as it is.
        _succeed("systemctl", "--user", "restart", UNIT, within=_stop_within(self._ends_within) + ANSWER_WITHIN)

    def uninstall(self) -> bool:
        """End the unit and remove the file; False if there was none."""
        if not self.file.exists():
            return False
        within = _stop_within(self._ends_within) + ANSWER_WITHIN
        _succeed("systemctl", "--user", "disable", "--now", UNIT, within=within)
        self.file.unlink(missing_ok=True)
        _succeed("systemctl", "--user", "daemon-reload")
        return True

    def status(self) -> tuple[bool, str]:
        """Whether it runs, and what systemd says about it."""
        done = _run("systemctl", "--user", "--no-pager", "status", UNIT)
        return not _failed(done), (done.stdout or done.stderr).rstrip()
