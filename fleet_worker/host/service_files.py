"""What the service managers of macOS and Linux have in common: the command, its limits, and how their tools are run."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from fleet_worker.errors import ConfigurationError, FleetError
from fleet_worker.settings import WorkerSettings

ENDS_WITHIN = WorkerSettings().killed_after


"""Seconds in which `fleet-worker up` has ended after SIGTERM, if the configuration says nothing else."""


LEAVE_WITHIN = 15.0


"""Seconds that the processes may take beyond that, before the manager kills what is left."""


ANSWER_WITHIN = 30.0


"""Seconds for a manager to answer."""


OPEN_FILES = 8192


"""Sockets of the busiest node many times over; launchd gives 256."""


Ran = subprocess.CompletedProcess[str]


UP = ["-m", "fleet_worker", "up"]


def _plain(path: str) -> str:
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
        raise ConfigurationError(f"a service's file can only name paths without control characters, in UTF-8: {path!r}")
    return path


def _stop_within(ends_within: float) -> int:
    return math.ceil(ends_within + LEAVE_WITHIN)


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
