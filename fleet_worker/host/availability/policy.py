"""Decides from the time and from readings whether a host may work, and why not: without a clock of its own, pure.

It leaves at once and comes back late, so that it does not come and go:

- A user has left after `idle_user` seconds; the first key ends that.
- Pressure and heat count after 10 s, since loading a model makes some; they must be gone for 60 s. A host that leaves
  again soon after it came back may itself be the cause: its next pause is twice as long, up to an hour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability.probes import MemoryPressure, Thermal
from fleet_worker.host.availability.readings import Readings
from fleet_worker.hours import DAY, DAYS, Hours, minute_of_week

USER = "a user is at it"
BATTERY = "on battery"
MEMORY = "short of memory"
HEAT = "too hot"
WOKEN = "it has just woken up"

UNKNOWN = 60.0
"""Seconds for which a probe must fail before a host that has left for it comes back. No host leaves for a failure."""


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds of hysteresis."""

    confirmed: float = 10.0
    """Pressure and heat count when they have lasted this long."""
    first: float = 60.0
    """After pressure or heat it comes back when they have been gone this long."""
    longest: float = 3600.0
    """`first` doubles up to this, each time that it must leave again soon."""
    soon: float = 1800.0
    """It leaves soon if it came back less than this before."""
    power: float = 5.0
    """After battery it comes back when the power has been there this long."""
    awake: float = 10.0
    """After sleep it comes back when the machine has been awake this long: it may go to sleep again."""


class Condition:
    """One condition of work, with its hysteresis."""

    def __init__(
        self, *, leaves_after: float = 0.0, returns_after: float = 0.0, longest: float = 0.0, soon: float = 0.0
    ) -> None:
        self._leaves_after = leaves_after
        self._first = self._returns_after = returns_after
        self._longest = max(longest, returns_after)
        self._soon = soon
        self._allows: bool | None = None
        self._good = True
        self._since = -math.inf
        """When `_good` became what it is."""
        self._returned_at = -math.inf

    def allows(self, now: float, reading: bool | None) -> bool:
        """Return whether work is allowed at this time, after a reading that was good or not, or failed."""
        good = reading is not False
        if self._allows is None:
            self._allows = good
        if good != self._good:
            self._good, self._since = good, now
        held = now - self._since
        returns_after = self._returns_after if reading else max(self._returns_after, UNKNOWN)
        if self._allows and not good and held >= self._leaves_after:
            self._allows = False
            again = now - self._returned_at < self._soon
            self._returns_after = min(self._longest, self._returns_after * 2) if again else self._first
        elif not self._allows and good and held >= returns_after:
            self._allows, self._returned_at = True, now
        return self._allows


class Policy:
    """The conditions of all settings, and the hours."""

    def __init__(self, settings: AvailabilitySettings, pauses: Pauses = Pauses()) -> None:
        self._settings = settings
        self._pauses = pauses
        self._most_memory = _level(MemoryPressure, settings.max_memory_pressure)
        self._most_heat = _level(Thermal, settings.max_thermal)
        self._works_from = -math.inf
        growing = {
            "leaves_after": pauses.confirmed,
            "returns_after": pauses.first,
            "longest": pauses.longest,
            "soon": pauses.soon,
        }
        self._user, self._power = Condition(), Condition(returns_after=pauses.power)
        self._memory, self._heat = Condition(**growing), Condition(**growing)

    def woke_up(self, now: float) -> None:
        """The machine has slept until `now`."""
        self._works_from = now + self._pauses.awake

    def is_open(self, local: datetime) -> bool:
        """Tell whether it is within the hours, so that readings are needed."""
        hours = self._settings.open_hours
        return hours is None or hours.contain(local)

    def reason_to_be_away(self, now: float, local: datetime, readings: Readings) -> str:
        """Return why this host must not work at `now`, in seconds of a monotonic clock; "" if it may."""
        idle_user = self._settings.idle_user
        allowed = {
            WOKEN: now >= self._works_from,
            USER: self._user.allows(now, None if readings.idle is None else readings.idle >= (idle_user or 0.0)),
            BATTERY: self._power.allows(now, readings.on_power),
            MEMORY: self._memory.allows(now, None if readings.memory is None else readings.memory <= self._most_memory),
            HEAT: self._heat.allows(now, None if readings.thermal is None else readings.thermal <= self._most_heat),
        }
        hours = self._settings.open_hours
        if hours and not hours.contain(local):
            return f"outside of its hours, until {opening(hours, local)}"
        return next((reason for reason, allows in allowed.items() if not allows), "")


def opening(hours: Hours, local: datetime) -> str:
    """Return the time at which the hours begin again, as in `19:00` or `Mon 19:00` if that is not within a day."""
    minutes = hours.minutes_to_change(local) or 0
    day, minute = divmod((minute_of_week(local) + minutes) % (7 * DAY), DAY)
    time = f"{minute // 60:02}:{minute % 60:02}"
    return time if minutes < DAY else f"{DAYS[day][:3].capitalize()} {time}"


def _level(levels: type[MemoryPressure] | type[Thermal], name: str | None) -> int:
    return levels[name.upper()] if name else max(levels)
