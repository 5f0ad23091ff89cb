"""`fleet-worker up` as an agent or a daemon of launchd, on macOS."""

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
from fleet_worker.host.account import Account
from fleet_worker.host.service_files import ANSWER_WITHIN, check, checked_path, run

LABEL = "org.fleet-worker.up"
DAEMONS = Path("/Library/LaunchDaemons")
_OF_AGENT = (
    "It starts when you log in, after a power cut too if automatic login is on (System Settings, Users).",
    "Without a login it runs as a service of the system: fleet-worker service install --system",
    "If the log says 'No route to host': System Settings, Privacy & Security, Local Network, allow Python.",
)
_OF_DAEMON = (
    "It starts at each boot, also if nobody logs in. With FileVault on, a boot waits for a password first.",
    "Unlike an agent it needs no permission for the local network.",
    "Whether this Mac starts by itself after a power cut, and stays awake: fleet-worker doctor",
)


class Launchd:
    """An agent of this user, which runs while that is logged in; or a daemon of the system, which runs under an account
    from the boot on. All methods but `text` and `problem` raise `FleetError` with the reason."""

    def __init__(self, ends_within: float, of_system: Account | None = None) -> None:
        self._ends_within = ends_within
        self._account = of_system
        self.is_of_system = of_system is not None
        home = of_system.home if of_system else Path.home()
        self.file = (DAEMONS if of_system else home / "Library" / "LaunchAgents") / f"{LABEL}.plist"
        self.log = home / "Library" / "Logs" / "fleet-worker" / "up.log"
        self._domain = "system" if of_system else f"gui/{os.getuid()}"
        self._target = f"{self._domain}/{LABEL}"
        self.hints = (*(_OF_DAEMON if of_system else _OF_AGENT), f"Log: {self.log}")

    def text(self, config: Path) -> str:
        """Return the content of the file; raises `ConfigurationError` for a path that it cannot hold."""
        limits = {"NumberOfFiles": service_files.OPEN_FILES}
        variables = {"FLEET_CONFIG": checked_path(str(config))}
        job = {
            "Label": LABEL,
            "ProgramArguments": [checked_path(sys.executable), *service_files.UP],
            "EnvironmentVariables": variables,
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": 10,
            "ExitTimeOut": service_files.stop_timeout(self._ends_within),
            # By default launchd throttles the CPU and disk of an agent.
            "ProcessType": "Interactive",
            "SoftResourceLimits": limits,
            "HardResourceLimits": limits,
            "StandardOutPath": str(self.log),
            "StandardErrorPath": str(self.log),
        }
        if self._account:
            job["UserName"] = self._account.name
            variables["HOME"] = checked_path(str(self._account.home))
        return plistlib.dumps(job, sort_keys=False).decode()

    def problem(self, *, changes: bool = True) -> str | None:
        """Return why launchd cannot be used here, at all or to change something; or None."""
        if not shutil.which("launchctl"):
            return "there is no launchctl on the PATH"
        if self.is_of_system:
            return service_files.needs_root() if changes else None
        if run("launchctl", "print", self._domain).returncode:
            return (
                "you are not logged in at the screen of this Mac, and only then does it run your agents; "
                "fleet-worker service install --system runs without a login"
            )
        return None

    def install(self, text: str) -> None:
        """Write the file and start the job. One that runs already ends first, as by SIGTERM."""
        service_files.write(self.file, text)
        service_files.make_folder(self.log.parent, self._account)  # launchd creates the log, but not its folder
        was_loaded = self._unload()
        check(run("launchctl", "enable", self._target))
        bootstrap = ("launchctl", "bootstrap", self._domain, str(self.file))
        # Shortly after the end of a job, launchd refuses the next one with "5: Input/output error".
        check(_repeat(bootstrap, until_failure=False, within=5.0 if was_loaded else 0.0))

    def uninstall(self) -> bool:
        """End the job and remove the file; return False if there was neither."""
        installed = self._unload() or self.file.exists()
        self.file.unlink(missing_ok=True)
        return installed

    def _unload(self) -> bool:
        """Return whether it was loaded. `bootout` may fail, or return before the agent has ended."""
        is_loaded = ("launchctl", "print", self._target)
        if run(*is_loaded).returncode:
            return False
        within = service_files.stop_timeout(self._ends_within) + ANSWER_WITHIN
        run("launchctl", "bootout", self._target, within=within)
        if not _repeat(is_loaded, until_failure=True, within=within).returncode:
            raise FleetError(f"{LABEL} did not end within {within:g} s")
        return True

    def status(self) -> tuple[bool, str]:
        """Return whether it runs, and a description: what launchd prints includes the environment."""
        done = run("launchctl", "print", self._target)
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
