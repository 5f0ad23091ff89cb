"""All faults of a configuration at once: what is wrong is taken out, and the rest is checked again.

Some rules are about several settings, as that `router.timeout` must not exceed `router.max_timeout`. They are only
checked where each setting is right by itself, so one look does not find everything.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic_settings import BaseSettings, InitSettingsSource

from fleet_worker.config_file import Place
from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings

MOST_LOOKS = 10
"""Each finds what the one before has uncovered; two or three are usual."""
Fault = tuple[Place, str]
"""Its place, and its text, which begins with the place."""


def all_faults(values: dict[str, Any]) -> list[Fault]:
    """Return the faults of the values of all settings, each once. A rule that is broken only because a faulty value was
    taken out is no fault."""
    values = copy.deepcopy(values)
    found: dict[Fault, None] = {}
    taken_out: dict[Place, set[int | str]] = {}  # names, by their table
    for _ in range(MOST_LOOKS):
        if not (seen := _look(values)):
            break
        found |= {fault: None for fault in seen if not _named_in(fault, taken_out.get(fault[0], ()))}
        for *table, name in [place for fault in seen for place in _take_out(values, *fault)]:
            taken_out.setdefault(tuple(table), set()).add(name)
    return list(found)


def _look(values: dict[str, Any]) -> list[Fault]:
    try:
        _Given(values)
    except ConfigurationError as error:
        return list(error.metadata["faults"])
    return []


class _Given(Settings):
    """Settings whose values are one argument: as arguments, some names of a file would mean something else."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values=values)

    @classmethod
    def settings_customise_sources(cls, settings_cls: type[BaseSettings], *_: Any, **sources: Any) -> Any:
        return (InitSettingsSource(settings_cls, sources["init_settings"].init_kwargs["values"]),)


def _named_in(fault: Fault, names: Iterable[int | str]) -> list[int | str]:
    """Return those of some names that are in the text of a fault. All rules name the settings that they are about."""
    words = set(re.findall(r"[\w-]+", fault[1]))
    return [name for name in names if name in words]


def _take_out(table: dict[Any, Any], place: Place, text: str) -> Iterator[Place]:
    """Take the value at a place out of a table; of a table that breaks a rule, what the text names, or else all.

    Yields the places of what was taken out.
    """
    if not place:
        for name in _named_in(((), text), table) or list(table):
            del table[name]
            yield (name,)
    elif isinstance(inner := table.get(place[0]), dict):
        yield from ((place[0], *each) for each in _take_out(inner, place[1:], text))
        if not inner:
            del table[place[0]]
    elif table.pop(place[0], None) is not None:
        yield place[:1]
