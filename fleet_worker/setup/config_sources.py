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
        self._names = names_of_variables()
        self._file = config_file.read()
        path = config_file.config_path()
        self._file_name = path.name if path else ""

    def of(self, place: Place, aliases: Iterable[str] = ()) -> str:
        """Return the name of a variable, the name of the file, or "default"."""
        names = [place, *((*place[:-1], alias) for alias in aliases)]
        if any(_has(self._variables, each) for each in names):
            return next(filter(None, (variable_of(each, self._names) for each in names)), "variable")
        return self._file_name if any(_has(self._file, each) for each in names) else DEFAULT


def _has(table: Any, place: Place) -> bool:
    for part in place:
        if not isinstance(table, Mapping) or part not in table:
            return False
        table = table[part]
    return True


class _Variables(EnvSettingsSource):
    """The values of all variables; notes those that are not JSON, instead of ending with the first one."""

    def __init__(self) -> None:
        super().__init__(Settings)
        self.not_json: list[str] = []

    def prepare_field_value(self, field_name: str, *rest: Any) -> Any:
        try:
            return super().prepare_field_value(field_name, *rest)
        except ValueError:
            self.not_json.append(field_name)
            return None


def values() -> tuple[dict[str, Any], list[str]]:
    """Return the values of all settings that the variables and the file of this process set, before any is checked; and
    the names of the settings whose variables are not JSON.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    source = _Variables()
    return _merged(source(), config_file.read()), source.not_json


def _merged(strong: dict[str, Any], weak: dict[str, Any]) -> dict[str, Any]:
    merged = {**weak, **strong}
    for name in strong.keys() & weak.keys():
        if isinstance(strong[name], dict) and isinstance(weak[name], dict):
            merged[name] = _merged(strong[name], weak[name])
    return merged


def names_of_variables() -> dict[str, str]:
    """Return the names of all variables of this process, each by the same name in capitals."""
    return {name.upper(): name for name in os.environ}


def variable_of(place: Place, names: Mapping[str, str]) -> str | None:
    """Return which of these variables sets a place, or a group around it as JSON; None if none does."""
    for depth in range(len(place), 0, -1):
        if name := names.get(PREFIX + "__".join(map(str, place[:depth])).upper()):
            return name
    return None


def variables() -> list[str]:
    """Return the names of the variables of this process that set something."""
    groups = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().partition("__")[0] in groups)
