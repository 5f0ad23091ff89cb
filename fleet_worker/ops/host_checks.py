"""Whether this machine lets its nodes work: its limits, its sleep, and whether it serves again after a reboot that
nobody sees.

The texts of commands are read by functions without side effects. A command that is missing, denied or silent is no
finding: what it would have told is then not known.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fleet_worker.host.launchd import Launchd
from fleet_worker.host.service import installed
from fleet_worker.host.service_files import ENDS_WITHIN
from fleet_worker.host.systemd import Systemd
from fleet_worker.ops.findings import Finding
from fleet_worker.settings import Settings

WITHIN = 3.0
"""Seconds for one command."""
OPEN_FILES = 1024
"""A lower limit is a warning."""
_END_OF_LOG = 64 * 1024
"""Bytes of it that are read."""
_OF_SYSTEM = "fleet-worker service install --system"
_UPDATES = "/Library/Preferences/com.apple.SoftwareUpdate"
_LOGIN = "/Library/Preferences/com.apple.loginwindow"


def open_files(_: object) -> list[Finding]:
    """Check the limit of open files."""
    limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return [Finding("ok", "no limit")]
    found = f"limit {limit} for processes started here"
    if limit >= OPEN_FILES:
        return [Finding("ok", found)]
    advice = "ulimit -n 4096 before starting a node; launchd: NumberOfFiles in SoftResourceLimits; systemd: LimitNOFILE"
    return [Finding("warning", found, advice)]


def sleep(settings: Settings | None) -> list[Finding]:
    """Check that this machine does not go to sleep while it works. Only on Macs, which have `pmset`."""
    if not shutil.which("pmset"):
        return []
    minutes = sleep_minutes(printed("pmset", "-g"))
    if minutes == 0:
        return [Finding("ok", "this machine does not go to sleep")]
    if minutes and settings and settings.availability.in_use and settings.availability.keep_awake:
        return [Finding("ok", f"this machine goes to sleep after {minutes} min, but not while a node works")]
    found = "unknown: pmset -g does not tell" if minutes is None else f"this machine goes to sleep after {minutes} min"
    return [Finding("warning", found, "sudo pmset -a sleep 0: a sleeping mini loses its requests")]


def sleep_minutes(pmset: str) -> int | None:
    """Return the idle minutes after which a Mac sleeps, from the output of `pmset -g`: 0 for never, None if unknown.

    `1 (sleep prevented by caffeinate)` counts as 1: caffeinate may end.
    """
    if re.search(r"^\s*SleepDisabled\s+1\s*$", pmset, re.MULTILINE):
        return 0
    settings = re.findall(r"^\s*sleep\s+(\d+)\b", pmset, re.MULTILINE)
    return max(map(int, settings), default=None)


def boot(settings: Settings | None) -> list[Finding]:
    """Check what would keep this host from serving after a reboot."""
    found = list(_of_mac() if sys.platform == "darwin" else _of_linux())
    if settings and (settings.up.gateway or any(each.opted_in for each in settings.instances.values())):
        found += service()
    return found or [Finding("ok", "nothing is known that would keep this host from serving after a reboot")]


def service() -> Iterator[Finding]:
    """Tell that no service is installed. That is no fault: another program may start `up`, or a person."""
    if not installed().file.exists():
        said = "no service is installed: after a reboot, something else must start fleet-worker up"
        yield Finding("ok", said, "fleet-worker service install")


def _of_mac() -> Iterator[Finding]:
    agent = Launchd(ENDS_WITHIN)
    yield from file_vault(printed("fdesetup", "status"))
    yield from power_cuts(printed("pmset", "-g"), printed("systemsetup", "-getrestartpowerfailure"))
    yield from updates(printed("defaults", "read", _UPDATES))
    if agent.file.exists():
        yield from login(printed("defaults", "read", _LOGIN))
        yield from local_network(end_of(agent.log))


def _of_linux() -> Iterator[Finding]:
    if Systemd(ENDS_WITHIN).file.exists():
        yield from linger(printed("loginctl", "show-user", "--property=Linger", str(os.getuid())))
    yield from idle_sleep(printed("loginctl", "show-user"), printed("systemctl", "is-enabled", "sleep.target"))


def printed(*command: str) -> str:
    """Return what a command prints; nothing if there is none, if it fails, or if it takes too long."""
    if not (program := shutil.which(command[0])):
        return ""
    try:
        done = subprocess.run(  # noqa: S603 - our own command lines
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=WITHIN,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # `systemctl is-enabled` fails for a unit that is masked, and says so.
    return done.stdout if not done.returncode or command[0] == "systemctl" else ""


def end_of(log: Path) -> str:
    """Return the end of a log; nothing if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _END_OF_LOG))
            return file.read(_END_OF_LOG).decode(errors="replace")
    except OSError:
        return ""


def file_vault(status: str) -> Iterator[Finding]:
    """Read `fdesetup status`: "FileVault is On." or "FileVault is Off.", and perhaps more lines."""
    if "FileVault is On" in status:
        advice = (
            "before a restart that you plan: sudo fdesetup authrestart; for others: sudo fdesetup disable, if its disk "
            "need not be encrypted"
        )
        yield Finding("warning", "FileVault is on: after a power cut this Mac waits for a password", advice)
    elif "FileVault is Off" in status:
        yield Finding("ok", "FileVault is off: it starts without a password")


def power_cuts(pmset: str, systemsetup: str) -> Iterator[Finding]:
    """Read the line `autorestart 1` of `pmset -g`, or else "Restart After Power Failure: On" of `systemsetup`."""
    line = re.search(r"^\s*autorestart\s+([01])\b", pmset, re.MULTILINE)
    said = re.search(r"^Restart After Power Failure: (On|Off)\b", systemsetup, re.MULTILINE)
    restarts = line[1] == "1" if line else said[1] == "On" if said else None
    if restarts:
        yield Finding("ok", "it starts by itself after a power cut")
    elif restarts is False:
        yield Finding("warning", "it stays off after a power cut", "sudo pmset -a autorestart 1")


def updates(defaults: str) -> Iterator[Finding]:
    """Read `AutomaticallyInstallMacOSUpdates = 1;` of the settings of Software Update."""
    setting = re.search(r"^\s*AutomaticallyInstallMacOSUpdates = ([01]);", defaults, re.MULTILINE)
    if setting and setting[1] == "1":
        advice = (
            f"sudo defaults write {_UPDATES} AutomaticallyInstallMacOSUpdates -bool false, and update it after "
            "fleet-worker drain"
        )
        yield Finding("warning", "macOS installs updates and restarts by itself", advice)
    elif setting:
        yield Finding("ok", "macOS does not restart by itself for updates")


def login(defaults: str) -> Iterator[Finding]:
    """Read `autoLoginUser = op;` of the settings of the login window, for a service that is an agent."""
    if not defaults:
        return
    if re.search(r"^\s*autoLoginUser = .+;", defaults, re.MULTILINE):
        yield Finding("ok", "somebody is logged in by itself, so the service starts")
    else:
        advice = f"fleet-worker service uninstall, then {_OF_SYSTEM}; or turn on automatic login"
        yield Finding("warning", "after a reboot the service waits until somebody logs in", advice)


def local_network(log: str) -> Iterator[Finding]:
    """Read the log of an agent, which needs the permission of a person for the local network. This command does not.

    What it says before a node was ready is over.
    """
    if "no route" in log.rpartition(" is ready, ")[2].lower():
        advice = (
            "System Settings, Privacy & Security, Local Network: allow Python; or fleet-worker service uninstall, then "
            f"{_OF_SYSTEM}, which needs no permission"
        )
        yield Finding("warning", "the log of the service says that there is no route to a host", advice)


def linger(properties: str) -> Iterator[Finding]:
    """Read `Linger=yes` of `loginctl show-user`, for a service that is a user unit."""
    if re.search(r"^Linger=no$", properties, re.MULTILINE):
        advice = f"loginctl enable-linger; or fleet-worker service uninstall, then {_OF_SYSTEM}"
        yield Finding("warning", "the service ends when you log out, and does not start at boot", advice)
    elif re.search(r"^Linger=yes$", properties, re.MULTILINE):
        yield Finding("ok", "the service starts at boot, and stays when you log out")


def idle_sleep(manager: str, sleep_target: str) -> Iterator[Finding]:
    """Read `IdleAction=suspend` of `loginctl show-user`, and whether `systemctl is-enabled sleep.target` is masked."""
    if sleep_target.strip() == "masked":
        yield Finding("ok", "this machine does not go to sleep: sleep.target is masked")
        return
    action = re.search(r"^IdleAction=([\w-]+)$", manager, re.MULTILINE)
    if action and ("suspend" in action[1] or action[1] in ("hibernate", "hybrid-sleep", "sleep")):
        advice = "sudo systemctl mask sleep.target suspend.target hibernate.target hybrid-sleep.target"
        yield Finding("warning", f"this machine goes to sleep when nobody uses it: IdleAction={action[1]}", advice)
