"""What launchd and systemd have in common: the command that they run, its limits, and how their own tools are run."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from fleet_worker.config_file import config_path
from fleet_worker.errors import ConfigurationError, FleetError
from fleet_worker.host.account import Account, is_root
from fleet_worker.settings import WorkerSettings

ENDS_WITHIN = WorkerSettings().killed_after
"""Seconds in which `fleet-worker up` ends after SIGTERM, with the default settings."""
ANSWER_WITHIN = 30.0
"""Seconds for an answer of a service manager."""
OPEN_FILES = 8192
"""Limit of open files: many times the sockets of the busiest node. The default of launchd is 256."""
UP = ["-m", "fleet_worker", "up"]


def stop_timeout(ends_within: float) -> int:
    """Return the seconds after which the manager kills what is left: 15 more than `up` itself takes."""
    return math.ceil(ends_within + 15.0)


def checked_path(path: str) -> str:
    """Return the path; raises `ConfigurationError` if a service's file cannot hold it."""
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
        raise ConfigurationError(f"a service's file can only name paths without control characters, in UTF-8: {path!r}")
    return path


def needs_root() -> str | None:
    """Return how to run this command again, if it is not root that runs it; else None."""
    if is_root():
        return None
    words = [sys.executable, "-m", "fleet_worker", *sys.argv[1:]]
    path = config_path()  # sudo drops FLEET_CONFIG
    if path and not any(word.partition("=")[0] == "--config" for word in words):
        words += ["--config", str(path.absolute())]
    return f"a service of the system needs root: sudo {shlex.join(words)}"


def make_folder(folder: Path, owner: Account | None) -> None:
    """Create a folder; what is new of its path belongs to `owner`. Raises `FleetError`."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if owner:
            for each in new:
                os.chown(each, owner.uid, owner.gid)
    except OSError as error:
        raise FleetError(f"{error.filename} cannot be written: {error.strerror}") from None


def write(file: Path, text: str) -> None:
    """Write a service's file and create its folder; raises `FleetError`."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
        file.chmod(0o644)  # launchd loads no file that others may write, as they may after `umask 002`
    except OSError as error:
        raise FleetError(f"{error.filename} cannot be written: {error.strerror}") from None


def run(*command: str, within: float = ANSWER_WITHIN) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, also if it fails; raises `FleetError` if it takes longer than `within` seconds."""
    try:
        return subprocess.run(  # noqa: S603 - our own command lines
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=within
        )
    except subprocess.TimeoutExpired:
        raise FleetError(f"`{' '.join(command)}` did not end within {within:g} s") from None


def check(done: subprocess.CompletedProcess[str]) -> None:
    """Raise `FleetError` if a command failed."""
    if done.returncode:
        raise FleetError(failure(done))


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return an error text with what a failed command printed."""
    printed = " ".join(done.stderr.split())
    return f"`{' '.join(done.args)}` failed: {printed or f'exit code {done.returncode}'}"
