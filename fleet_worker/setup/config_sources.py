"""Where the value of a setting comes from: a variable, the file, or the default."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_settings import EnvSettingsSource

from fleet_worker import config_file
from fleet_worker.config_file import Place
from fleet_worker.host.variables import PREFIX
from fleet_worker.settings import Settings

DEFAULT = "default"


class Sources:
    """The sources of the settings that a process has.

    Raises:
        ConfigurationError: the file cannot be read.
        SettingsError: a variable is not JSON.
    """

    def __init__(self) -> None:
        self._variables = EnvSettingsSource(Settings)()
        self._file = config_file.read()
        path = config_file.config_path()
        self._file_name = path.name if path else ""

    def of(self, place: Place, aliases: Iterable[str] = ()) -> str:
        """Return the name of a variable, the name of the file, or "default"."""
        names = [place, *((*place[:-1], alias) for alias in aliases)]
        if any(_has(self._variables, each) for each in names):
            return next(filter(None, map(variable_of, names)), "variable")
        return self._file_name if any(_has(self._file, each) for each in names) else DEFAULT


def _has(table: Any, place: Place) -> bool:
    for part in place:
        if not isinstance(table, Mapping) or part not in table:
            return False
        table = table[part]
    return True


def variable_of(place: Place) -> str | None:
    """Return the variable of this process that sets a place, or a group around it as JSON; None if there is none."""
    names = {name.upper(): name for name in os.environ}
    for depth in range(len(place), 0, -1):
        if name := names.get(PREFIX + "__".join(map(str, place[:depth])).upper()):
            return name
    return None


def variables() -> list[str]:
    """Return the names of the variables of this process that set something."""
    groups = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().partition("__")[0] in groups)
