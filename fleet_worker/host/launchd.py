"""`fleet-worker up` as an agent of launchd, on macOS."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fleet_worker.errors import FleetError
from fleet_worker.host import service_files
from fleet_worker.host.service_files import ANSWER_WITHIN, check, checked_path, run

LABEL = "org.fleet-worker.up"


class Launchd:
    """An agent of this user. All methods but `text` and `problem` raise `FleetError` with the reason."""

    def __init__(self, ends_within: float) -> None:
        self._ends_within = ends_within
        library = Path.home() / "Library"
        self.file = library / "LaunchAgents" / f"{LABEL}.plist"
        self._log = library / "Logs" / "fleet-worker" / "up.log"
        self._domain = f"gui/{os.getuid()}"
        self._agent = f"{self._domain}/{LABEL}"
        self.hints = [
            "It starts when you log in, after a power cut too if automatic login is on (System Settings, Users).",
            "If the log says 'No route to host': System Settings, Privacy & Security, Local Network, allow Python.",
            f"Log: {self._log}",
        ]

    def text(self, config: Path) -> str:
        """Return the content of the file; raises `ConfigurationError` for a path that it cannot hold."""
        limits = {"NumberOfFiles": service_files.OPEN_FILES}
        agent = {
            "Label": LABEL,
            "ProgramArguments": [checked_path(sys.executable), *service_files.UP],
            "EnvironmentVariables": {"FLEET_CONFIG": checked_path(str(config))},
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": 10,
            "ExitTimeOut": service_files.stop_timeout(self._ends_within),
            # By default launchd throttles the CPU and disk of an agent.
            "ProcessType": "Interactive",
            "SoftResourceLimits": limits,
            "HardResourceLimits": limits,
            "StandardOutPath": str(self._log),
            "StandardErrorPath": str(self._log),
        }
        return plistlib.dumps(agent, sort_keys=False).decode()

    def problem(self) -> str | None:
        """Return why launchd cannot be used here, or None."""
        if not shutil.which("launchctl"):
            return "there is no launchctl on the PATH"
        if run("launchctl", "print", self._domain).returncode:
            return "you are not logged in at the screen of this Mac, and only then does it run your agents"
        return None

    def install(self, text: str) -> None:
        """Write the file and start the agent. An agent that runs already ends first, as by SIGTERM."""
        service_files.write(self.file, text, self._log.parent)  # launchd creates the log, but not its folder
        was_loaded = self._unload()
        check(run("launchctl", "enable", self._agent))
        bootstrap = ("launchctl", "bootstrap", self._domain, str(self.file))
        # Shortly after the end of an agent, launchd refuses the next one with "5: Input/output error".
        check(_repeat(bootstrap, until_failure=False, within=5.0 if was_loaded else 0.0))

    def uninstall(self) -> bool:
        """End the agent and remove the file; return False if there was neither."""
        installed = self._unload() or self.file.exists()
        self.file.unlink(missing_ok=True)
        return installed

    def _unload(self) -> bool:
        """Return whether it was loaded. `bootout` may fail, or return before the agent has ended."""
        is_loaded = ("launchctl", "print", self._agent)
        if run(*is_loaded).returncode:
            return False
        within = service_files.stop_timeout(self._ends_within) + ANSWER_WITHIN
        run("launchctl", "bootout", self._agent, within=within)
        if not _repeat(is_loaded, until_failure=True, within=within).returncode:
            raise FleetError(f"{LABEL} did not end within {within:g} s")
        return True

    def status(self) -> tuple[bool, str]:
        """Return whether it runs, and a description: what launchd prints includes the environment."""
        done = run("launchctl", "print", self._agent)
        if done.returncode:
            return False, f"{LABEL} is {'not loaded' if self.file.exists() else 'not installed'}"
        state = _printed_value("state", done.stdout)
        more = [(name, _printed_value(name, done.stdout)) for name in ("pid", "last exit code")]
        return state == "running", f"{LABEL} is {state}{''.join(f', {name} {value}' for name, value in more if value)}"


def _repeat(command: tuple[str, ...], *, until_failure: bool, within: float) -> subprocess.CompletedProcess[str]:
    """Run a command again and again, since launchd has no event to wait for; return the last result."""
    deadline = time.monotonic() + within
    while True:
        done = run(*command)
        if bool(done.returncode) == until_failure or time.monotonic() >= deadline:
            return done
        time.sleep(0.2)


def _printed_value(name: str, printed: str) -> str | None:
    """Return the first value of this name: later sections of `launchctl print` repeat some names."""
    found = re.search(rf"^\s*{name} = (.+)$", printed, re.MULTILINE)
    return found[1] if found else None
