"""The probes of Linux: /proc, /sys, the terminals of its users, and what logind knows of their sessions."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from fleet_worker.host.availability import probes
from fleet_worker.host.availability.probes import MemoryPressure, ProbeFailed, Thermal

STALLED = 10.0
"""Per cent of the last ten seconds in which a process waited for memory: a warning. In which all did: critical."""
FREE = {MemoryPressure.CRITICAL: 0.05, MemoryPressure.WARNING: 0.10}
"""The share of the memory that is available at most, where the kernel does not measure pressure."""
NEAR = 10.0
"""Degrees below the first limit of a sensor from which on it counts as MODERATE."""

_PROPERTIES = ("Class", "Type", "TTY", "State", "IdleHint", "IdleSinceHintMonotonic", "LockedHint")


class LinuxProbes:
    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def on_power(self) -> bool:
        return probes.on_power()

    def idle_seconds(self) -> float:
        """The shortest time of all users: that of a desktop as it tells logind, that of a terminal as `w` shows it."""
        terminals = {user.terminal for user in psutil.users() if user.terminal}
        try:
            sessions = list(_sessions())
        except ProbeFailed:
            if not terminals:
                raise
            sessions = []
        desktops = [session for session in sessions if session.get("Type") in ("x11", "wayland", "mir")]
        terminals |= {session.get("TTY", "") for session in sessions}
        terminals -= {session.get("TTY", "") for session in desktops} | {""}
        now = time.monotonic()
        idle = [idle_desktop(session, now) for session in desktops] + list(self._idle_terminals(terminals))
        return min(idle, default=math.inf)

    def _idle_terminals(self, terminals: Iterable[str]) -> Iterator[float]:
        """A terminal is accessed when a program reads what was typed there."""
        for terminal in terminals:
            with suppress(OSError):  # ":0" of a desktop is no file
                yield max(0.0, time.time() - (self._root / "dev" / terminal).stat().st_atime)

    def memory_pressure(self) -> MemoryPressure:
        try:
            return pressure_of((self._root / "proc/pressure/memory").read_text("ascii"))
        except OSError:  # a kernel without CONFIG_PSI
            memory = psutil.virtual_memory()
            return next(
                (level for level, share in FREE.items() if memory.available < share * memory.total),
                MemoryPressure.NORMAL,
            )

    def thermal(self) -> Thermal:
        zones = [zone for folder in (self._root / "sys/class/thermal").glob("thermal_zone*") for zone in _zone(folder)]
        if not zones:
            raise ProbeFailed("/sys/class/thermal shows no sensor with a limit")
        return max(zones)


def _sessions() -> Iterator[dict[str, str]]:
    """Yield the properties of all sessions in which somebody works; raises `ProbeFailed`."""
    listed = probes.output_of("loginctl", "list-sessions", "--no-legend").splitlines()
    names = [words[0] for line in listed if (words := line.split())]
    if not names:
        return
    shown = probes.output_of("loginctl", "show-session", *names, *(f"--property={name}" for name in _PROPERTIES))
    for block in re.split(r"\n\s*\n", shown.strip()):
        session = dict(line.partition("=")[::2] for line in block.splitlines())
        if session.get("Class", "").startswith("user") and session.get("State") != "closing":
            yield session


def idle_desktop(session: dict[str, str], now: float) -> float:
    """Return the seconds since a desktop was used. One with a locked screen has been left."""
    if session.get("LockedHint") == "yes":
        return math.inf
    if session.get("IdleHint") != "yes":
        return 0.0
    return max(0.0, now - int(session.get("IdleSinceHintMonotonic") or 0) / 1e6)


def pressure_of(pressure: str) -> MemoryPressure:
    """Return the level of the text of /proc/pressure/memory."""
    averages = {kind: float(value) for kind, value in re.findall(r"^(\w+) avg10=([\d.]+)", pressure, re.MULTILINE)}
    if "some" not in averages:
        raise ProbeFailed("/proc/pressure/memory has no average")
    if averages.get("full", 0.0) >= STALLED:
        return MemoryPressure.CRITICAL
    return MemoryPressure.WARNING if averages["some"] >= STALLED else MemoryPressure.NORMAL


def _zone(folder: Path) -> Iterator[Thermal]:
    """Yield the level of a sensor, if it works and has limits: HEAVY from `passive`, where the system slows itself
    down, TRAPPING from `hot` or `critical`.
    """
    limits: dict[str, float] = {}
    with suppress(OSError, ValueError):
        temperature = _degrees(folder / "temp")
        for kind in folder.glob("trip_point_*_type"):
            name, limit = kind.read_text("ascii").strip(), _degrees(kind.with_name(kind.name.replace("_type", "_temp")))
            if name in ("passive", "hot", "critical") and limit > 0:
                limits[name] = min(limit, limits.get(name, limit))
        if limits:
            yield thermal_of(temperature, limits)


def thermal_of(temperature: float, limits: dict[str, float]) -> Thermal:
    """Return the level of a temperature, by the limits of its sensor, in degrees."""
    if any(temperature >= limit for name, limit in limits.items() if name != "passive"):
        return Thermal.TRAPPING
    if temperature >= limits.get("passive", math.inf):
        return Thermal.HEAVY
    return Thermal.MODERATE if temperature >= min(limits.values()) - NEAR else Thermal.NOMINAL


def _degrees(file: Path) -> float:
    """The kernel has thousandths."""
    return int(file.read_text("ascii")) / 1000
