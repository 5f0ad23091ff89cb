"""The probes of macOS: the outputs of its commands, as documented in their manual pages."""

from __future__ import annotations

import re

from fleet_worker.host.availability import probes
from fleet_worker.host.availability.probes import MemoryPressure, ProbeFailed, Thermal

PRESSURE = "kern.memorystatus_vm_pressure_level"
THERMAL = "com.apple.system.thermalpressurelevel"
"""What notify(3) calls the thermal pressure; `OSThermalNotification.h` names it."""


class MacProbes:
    def on_power(self) -> bool:
        return probes.on_power()

    def idle_seconds(self) -> float:
        return idle_seconds(probes.output_of("ioreg", "-c", "IOHIDSystem", "-d", "4", "-w", "0"))

    def memory_pressure(self) -> MemoryPressure:
        return MemoryPressure(int(probes.output_of("sysctl", "-n", PRESSURE)))

    def thermal(self) -> Thermal:
        """The level that is published for every program; else whether `pmset` says that the processor is slowed down,
        which it tells on Macs with an Intel processor only.
        """
        try:
            return thermal(probes.output_of("notifyutil", "-g", THERMAL))
        except (ProbeFailed, ValueError):
            return slowed_down(probes.output_of("pmset", "-g", "therm"))


def idle_seconds(ioreg: str) -> float:
    """Return the seconds since the last use of keyboard or mouse; `ioreg` has nanoseconds."""
    found = re.findall(r'"HIDIdleTime"\s*=\s*(\d+)', ioreg)
    if not found:
        raise ProbeFailed("ioreg -c IOHIDSystem shows no HIDIdleTime")
    return min(map(int, found)) / 1e9


def thermal(notifyutil: str) -> Thermal:
    """Return the level of a line such as `com.apple.system.thermalpressurelevel 0`."""
    found = re.search(rf"{re.escape(THERMAL)}\s+(\d+)\s*$", notifyutil, re.MULTILINE)
    if not found:
        raise ProbeFailed(f"notifyutil -g does not show {THERMAL}")
    return Thermal(min(int(found[1]), Thermal.SLEEPING))


def slowed_down(pmset: str) -> Thermal:
    """Return HEAVY if `pmset -g therm` shows a limit below 100 per cent for the speed of the processor."""
    limits = [int(limit) for limit in re.findall(r"CPU_(?:Speed|Scheduler)_Limit\s*=\s*(\d+)", pmset)]
    if not limits:
        raise ProbeFailed("neither notifyutil nor pmset -g therm shows the thermal pressure")
    return Thermal.HEAVY if min(limits) < 100 else Thermal.NOMINAL
