"""What is asked of a machine to know whether its owner needs it: the same four questions on each system."""

from __future__ import annotations

import os
import shutil
import subprocess
from enum import IntEnum
from typing import Protocol

import psutil

FOLDERS = "/usr/bin:/bin:/usr/sbin:/sbin"
"""Where the commands of the system are, besides PATH: that of launchd is short."""
TIMEOUT = 2.0
"""Seconds that a command has."""


class ProbeFailed(Exception):
    """A question has no answer here; the text says why."""


class MemoryPressure(IntEnum):
    """The three levels of macOS, by the numbers of `kern.memorystatus_vm_pressure_level`."""

    NORMAL = 1
    WARNING = 2
    CRITICAL = 4


class Thermal(IntEnum):
    """The levels of macOS, by the numbers of `OSThermalNotification.h`. At HEAVY a machine slows itself down."""

    NOMINAL = 0
    MODERATE = 1
    HEAVY = 2
    TRAPPING = 3
    SLEEPING = 4


class Probes(Protocol):
    """The answers of one system. Each may take TIMEOUT seconds.

    Raises:
        ProbeFailed, OSError, ValueError: there is no answer; the text is for a log.
    """

    def on_power(self) -> bool: ...

    def idle_seconds(self) -> float:
        """Return how long nobody has used keyboard or mouse; infinite if nobody is logged in."""

    def memory_pressure(self) -> MemoryPressure: ...

    def thermal(self) -> Thermal: ...


def on_power() -> bool:
    """Tell whether this machine is not on battery: on both systems, with a battery, a UPS or neither."""
    battery = psutil.sensors_battery()
    if battery is None:
        return True
    if battery.power_plugged is None:
        raise ProbeFailed("the system does not tell whether the battery is charged")
    return battery.power_plugged


def output_of(*command: str) -> str:
    """Return what a command of the system prints; raises `ProbeFailed`."""
    program = find_program(command[0])
    if not program:
        raise ProbeFailed(f"{command[0]} is not there")
    try:
        done = subprocess.run(  # noqa: S603 - commands of the system, with our own arguments
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise ProbeFailed(f"{command[0]} did not answer within {TIMEOUT:g} s") from None
    if done.returncode:
        raise ProbeFailed(f"{command[0]} ended with exit code {done.returncode}")
    return done.stdout.decode(errors="replace")


def find_program(program: str) -> str | None:
    """Return the path of a command of the system; None if it is not there."""
    return shutil.which(program, path=os.pathsep.join(filter(None, [os.environ.get("PATH"), FOLDERS])))
