"""Reads what the settings ask for, and nothing else. What cannot be read is said once, and changes nothing."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability.linux import LinuxProbes
from fleet_worker.host.availability.macos import MacProbes
from fleet_worker.host.availability.probes import MemoryPressure, ProbeFailed, Probes, Thermal

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Readings:
    """What was read of this machine; None: it was not asked for, or cannot be read."""

    idle: float | None = None
    on_power: bool | None = None
    memory: MemoryPressure | None = None
    thermal: Thermal | None = None


def probes_of_this_host() -> Probes:
    return MacProbes() if sys.platform == "darwin" else LinuxProbes()


def wanted_probes(settings: AvailabilitySettings, probes: Probes) -> dict[str, Callable[[], object]]:
    """Return the probes that the settings need, each by the name of its setting."""
    wanted: dict[str, tuple[bool, Callable[[], object]]] = {
        "idle_user": (settings.idle_user is not None, probes.idle_seconds),
        "only_on_power": (settings.only_on_power, probes.on_power),
        "max_memory_pressure": (settings.max_memory_pressure is not None, probes.memory_pressure),
        "max_thermal": (settings.max_thermal is not None, probes.thermal),
    }
    return {name: probe for name, (is_wanted, probe) in wanted.items() if is_wanted}


class Reader:
    """Reads the idle time of the user each time, all else every `period` seconds."""

    def __init__(
        self,
        settings: AvailabilitySettings,
        probes: Probes,
        *,
        period: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probes = wanted_probes(settings, probes)
        self._period = period
        self._clock = clock
        self._failed: set[str] = set()
        self._slow = Readings()
        self._read_at = -math.inf

    def read(self) -> Readings:
        now = self._clock()
        if now - self._read_at >= self._period:
            self._read_at = now
            self._slow = Readings(
                on_power=self._read("only_on_power", bool),
                memory=self._read("max_memory_pressure", MemoryPressure),
                thermal=self._read("max_thermal", Thermal),
            )
        slow = self._slow
        return Readings(self._read("idle_user", float), slow.on_power, slow.memory, slow.thermal)

    def _read(self, setting: str, kind: Callable[..., Answer]) -> Answer | None:
        probe = self._probes.get(setting)
        if not probe:
            return None
        try:
            return kind(probe())
        except Exception as error:  # whatever a system answers: no mini leaves for that
            if setting not in self._failed:
                self._failed.add(setting)
                log.warning("availability.%s has no effect while this fails: %s", setting, reason_of(error))
            return None


def reason_of(error: Exception) -> str:
    """Return why a probe failed, in a short text."""
    return str(error) if isinstance(error, ProbeFailed) else f"{type(error).__name__}: {str(error)[:200]}"
