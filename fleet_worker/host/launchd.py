"""`fleet-worker up` as an agent of launchd, on macOS."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import sys
from pathlib import Path

from fleet_worker.errors import FleetError
from fleet_worker.host.service_files import (
    ANSWER_WITHIN,
    ENDS_WITHIN,
    OPEN_FILES,
    UP,
    _checked,
    _failed,
    _plain,
    _repeat,
    _run,
    _stop_within,
    _succeed,
    _write,
)

LABEL = "org.fleet-worker.up"


def launchd_plist(
    config: Path, *, log: Path, interpreter: str = sys.executable, ends_within: float = ENDS_WITHIN
) -> bytes:
    """The property list of the agent; raises `ConfigurationError` for a path that it cannot hold."""
    limits = {"NumberOfFiles": OPEN_FILES}
    agent = {
        "Label": LABEL,
        "ProgramArguments": [_plain(interpreter), *UP],
        "EnvironmentVariables": {"FLEET_CONFIG": _plain(str(config))},
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": _stop_within(ends_within),
        # Without it launchd takes the job for one that may wait, and throttles its CPU and disk.
        "ProcessType": "Interactive",
        "SoftResourceLimits": limits,
        "HardResourceLimits": limits,
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
    }
    return plistlib.dumps(agent, sort_keys=False)


class Launchd:
    """An agent of this user. Every method but `text` and `problem` raises `FleetError` with what went wrong."""

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
        return launchd_plist(config, log=self._log, ends_within=self._ends_within).decode()

    def problem(self) -> str | None:
        """Why it cannot be used here and now."""
        if not shutil.which("launchctl"):
            return "there is no launchctl on the PATH"
        if _run("launchctl", "print", self._domain).returncode:
            return "you are not logged in at the screen of this Mac, and only then does it run your agents"
        return None

    def install(self, text: str) -> None:
        """Write the file and start the agent. One that runs already ends first, as by SIGTERM."""
        _write(self.file, text, self._log.parent)  # launchd makes the log, but not its folder
        again = self._unload()
        _succeed("launchctl", "enable", self._agent)
        bootstrap = ("launchctl", "bootstrap", self._domain, str(self.file))
        # For a moment after an agent is gone, launchd says "5: Input/output error" to its successor.
        _checked(_repeat(bootstrap, until_it_fails=False, within=5.0 if again else 0.0))

    def uninstall(self) -> bool:
        """End the agent and remove the file; False if there was neither."""
        installed = self._unload() or self.file.exists()
        self.file.unlink(missing_ok=True)
        return installed

    def _unload(self) -> bool:
        """Return whether it was loaded. `bootout` may return before the agent has ended, with an error."""
        question = ("launchctl", "print", self._agent)
        if _failed(_run(*question)):
            return False
        within = _stop_within(self._ends_within) + ANSWER_WITHIN
        _run("launchctl", "bootout", self._agent, within=within)
        if not _failed(_repeat(question, until_it_fails=True, within=within)):
            raise FleetError(f"{LABEL} did not end within {within:g} s")
        return True

    def status(self) -> tuple[bool, str]:
        """Whether it runs, and words about it: not all that launchd prints, which has the environment in it."""
        done = _run("launchctl", "print", self._agent)
        if _failed(done):
            return False, f"{LABEL} is {'not loaded' if self.file.exists() else 'not installed'}"
        state = _fact("state", done.stdout)
        others = [f", {name} {fact}" for name in ("pid", "last exit code") if (fact := _fact(name, done.stdout))]
        return state == "running", f"{LABEL} is {state}{''.join(others)}"


def _fact(name: str, printed: str) -> str | None:
    """What `launchctl print` says first; the sections that follow repeat some names."""
    found = re.search(rf"^\s*{name} = (.+)$", printed, re.MULTILINE)
    return found[1] if found else None
