"""`fleet-worker up` as a service of this user: an agent of launchd on macOS, a user unit of systemd on Linux."""

from __future__ import annotations

import math
import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from fleet_worker.errors import ConfigurationError, FleetError
from fleet_worker.settings import Settings, Worker

__all__ = [
    "LABEL",
    "UNIT",
    "Launchd",
    "Systemd",
    "configuration",
    "launchd_plist",
    "service_manager",
    "systemd_unit",
]

LABEL = "org.fleet-worker.up"
UNIT = "fleet-worker.service"
ENDS_WITHIN = Worker().killed_after
"""Seconds in which `fleet-worker up` has ended after SIGTERM, if the configuration says nothing else."""
LEAVE_WITHIN = 15.0
"""Seconds that the processes may take beyond that, before the manager kills what is left."""
ANSWER_WITHIN = 30.0
"""Seconds for a manager to answer."""
OPEN_FILES = 8192
"""Sockets of the busiest node many times over; launchd gives 256."""

Ran = subprocess.CompletedProcess[str]


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


UP = ["-m", "fleet_worker", "up"]

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


def _plain(path: str) -> str:
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
        raise ConfigurationError(f"a service's file can only name paths without control characters, in UTF-8: {path!r}")
    return path


def _quoted(word: str) -> str:
    """One word for systemd, where % begins a specifier also in quotes."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _stop_within(ends_within: float) -> int:
    return math.ceil(ends_within + LEAVE_WITHIN)


def service_manager(ends_within: float = ENDS_WITHIN) -> Launchd | Systemd:
    """The one whose command is there; without any, the one of this platform, which can still say what it would do."""
    if shutil.which("launchctl") or (sys.platform == "darwin" and not shutil.which("systemctl")):
        return Launchd(ends_within)
    return Systemd(ends_within)


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


def _write(file: Path, text: str, *folders: Path) -> None:
    try:
        for folder in (file.parent, *folders):
            folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
        file.chmod(0o644)  # launchd takes no file that others may write, as they may after `umask 002`
    except OSError as error:
        raise FleetError(f"{error.filename} cannot be written: {error.strerror}") from None


def _succeed(*command: str, within: float = ANSWER_WITHIN) -> None:
    _checked(_run(*command, within=within))


def _checked(done: Ran) -> None:
    if _failed(done):
        raise FleetError(_complaint(done))


def _run(*command: str, within: float = ANSWER_WITHIN) -> Ran:
    try:
        return subprocess.run(  # noqa: S603 - our own command lines
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=within
        )
    except subprocess.TimeoutExpired:
        raise FleetError(f"`{' '.join(command)}` did not end within {within:g} s") from None


def _repeat(command: tuple[str, ...], *, until_it_fails: bool, within: float) -> Ran:
    """Run it again and again, since launchd has no event to wait for; return the last result."""
    attempts = Retrying(
        retry=retry_if_result(lambda done: _failed(done) != until_it_fails),
        stop=stop_after_delay(within),
        wait=wait_fixed(0.2),
        retry_error_callback=lambda state: state.outcome and state.outcome.result(),
    )
    done: Ran = attempts(_run, *command)
    return done


def _failed(done: Ran) -> bool:
    return done.returncode != 0


def _complaint(done: Ran) -> str:
    said = " ".join(done.stderr.split())
    return f"`{' '.join(done.args)}` failed: {said or f'exit code {done.returncode}'}"
