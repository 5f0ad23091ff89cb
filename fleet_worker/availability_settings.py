"""Settings of when a host may work: its owner comes first."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fleet_worker.hours import UNDERSTOOD, Hours
from fleet_worker.instance_settings import Group


def _check_hours(hours: Any) -> Any:
    if not hours or not all(isinstance(text, str) for text in _texts(hours)):
        raise ValueError(f"must be a text or a list of texts; {UNDERSTOOD}")
    Hours.parse(_texts(hours))
    return hours


def _texts(hours: Any) -> tuple[Any, ...]:
    return tuple(hours) if isinstance(hours, list | tuple) else (hours,)


class AvailabilitySettings(Group):
    """`availability`: without this section a host always works, and nothing of this is probed."""

    hours: Annotated[str | tuple[str, ...], BeforeValidator(_check_hours)] | None = None
    """Hours of the week in which it works, as in `"mon-fri 19:00-08:00, sat, sun"`, in local time. Default: always.
    Hours over midnight belong to the day on which they begin."""
    only_on_power: bool = False
    """Work only while this machine is not on battery."""
    idle_user: float | None = Field(None, ge=1)
    """Seconds without keyboard and mouse after which it works. Without it, a user changes nothing."""
    max_memory_pressure: Literal["normal", "warning"] | None = None
    """Work only up to this pressure on the memory, in the words of macOS: `normal`, `warning`, `critical`."""
    max_thermal: Literal["nominal", "moderate", "heavy"] | None = None
    """Work only up to this thermal pressure, in the words of macOS: `nominal`, `moderate`, `heavy`, `trapping`."""
    stop_servers: bool = True
    """Stop the servers that `up` has started while it does not work, so that their memory is free."""
    grace: float = Field(5.0, ge=0)
    """Seconds that running requests have to end when it may not work any more. Then other nodes continue them."""
    keep_awake: bool = True
    """Keep this machine from sleeping while a node runs a request."""

    @property
    def in_use(self) -> bool:
        """True if the section sets anything."""
        return bool(self.model_fields_set)

    @cached_property
    def open_hours(self) -> Hours | None:
        """The hours in which it works; None for always."""
        return None if self.hours is None else Hours.parse(_texts(self.hours))
