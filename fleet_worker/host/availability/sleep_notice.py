"""The notice of the system that this machine goes to sleep, and the short delay that a program may ask for.

On Linux logind gives it: a monitor of D-Bus prints it, and `systemd-inhibit` holds the delay. On macOS a small process
of its own asks IOKit for both (`mac_sleep`). All of these processes end with this one. Without them a sleep is noticed
afterwards, from the clocks.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from fleet_worker.host.availability.held_process import UNTIL_INPUT_ENDS, HeldProcess
from fleet_worker.host.availability.probes import find_program
from fleet_worker.host.child_process import python

log = logging.getLogger(__name__)

RESTART_AFTER = 60.0
"""Seconds after which a monitor that has ended is started again."""
SIGNAL = "PrepareForSleep"

_LOGIND = "org.freedesktop.login1"
_MATCH = f"type='signal',interface='{_LOGIND}.Manager',member='{SIGNAL}'"
MONITORS = (
    ("gdbus", "monitor", "--system", "--dest", _LOGIND, "--object-path", "/org/freedesktop/login1"),
    ("dbus-monitor", "--system", _MATCH),
    ("busctl", "--system", "--match", _MATCH, "monitor"),  # for root only
)
DELAY = ("systemd-inhibit", "--what=sleep", "--who=fleet-worker", "--why=it hands over its requests", "--mode=delay")
_UNTIL_INPUT_ENDS = '"$@" & exec >&-; read -r end; kill $!'
"""Runs a monitor until its own input ends. Its output ends with the monitor."""


class SleepNotice:
    """Calls `heard(True)` before a sleep and `heard(False)` after it, in a thread of its own."""

    def __init__(self, heard: Callable[[bool], None]) -> None:
        self._heard = heard
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._monitor: HeldProcess | None = None
        self._delay: HeldProcess | None = None
        self._thread = threading.Thread(target=self._run, name="sleep notice", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def allow(self) -> None:
        """Let the machine sleep now."""
        with self._lock:
            if sys.platform == "darwin" and self._monitor:
                self._monitor.write_line()
            elif self._delay:
                self._delay.release()

    def close(self) -> None:
        """End its thread and its processes, within a second."""
        with self._lock:
            self._closed.set()
            if self._monitor:
                self._monitor.release()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        said = False
        while not self._closed.is_set():
            self._start()
            for asleep in notices(self._lines()):
                if not asleep:
                    self._renew_delay()
                self._heard(asleep)
            self._end()
            if not self._closed.is_set() and not said:
                said = True
                log.info("nothing tells here that this machine goes to sleep: a sleep is noticed afterwards")
            self._closed.wait(RESTART_AFTER)

    def _start(self) -> None:
        command = monitor_command()
        with self._lock, suppress(OSError):
            if command and not self._closed.is_set():
                self._monitor = HeldProcess(command, stdout=subprocess.PIPE)
                self._delay = _delay()

    def _lines(self) -> Iterator[str]:
        if self._monitor and self._monitor.stdout:
            with self._monitor.stdout as lines:
                for line in lines:
                    yield line.decode(errors="replace")

    def _renew_delay(self) -> None:
        if self._delay:
            self._delay.end()
        with self._lock, suppress(OSError):
            self._delay = None if self._closed.is_set() else _delay()

    def _end(self) -> None:
        for process in filter(None, (self._delay, self._monitor)):
            process.end()
        self._delay = self._monitor = None


def monitor_command() -> list[str] | None:
    """Return the command that prints the notices; None if there is none here."""
    if sys.platform == "darwin":
        return python("-P", "-m", "fleet_worker.host.availability.mac_sleep")
    for program, *arguments in MONITORS:
        if path := find_program(program):
            return ["/bin/sh", "-c", _UNTIL_INPUT_ENDS, "sh", path, *arguments]
    return None


def notices(lines: Iterable[str]) -> Iterator[bool]:
    """Yield True before a sleep and False after it, from the output of any of MONITORS.

    The name of the signal and its argument are in one line (gdbus) or in two (the others).
    """
    announced = False
    for line in lines:
        announced = announced or SIGNAL in line
        if announced and (argument := re.search(r"\b(true|false)\b", line)):
            announced = False
            yield argument[1] == "true"


def _delay() -> HeldProcess | None:
    program = None if sys.platform == "darwin" else find_program(DELAY[0])
    return HeldProcess([program, *DELAY[1:], *UNTIL_INPUT_ENDS]) if program else None
