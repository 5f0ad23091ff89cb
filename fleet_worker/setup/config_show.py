"""`fleet-worker config show`: what is in force and where each value comes from, without secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import AliasChoices, BaseModel, SecretStr
from pydantic.fields import FieldInfo

from fleet_worker.config_file import config_path
from fleet_worker.instance_settings import NEED_SERVE
from fleet_worker.redaction import HIDDEN, redacted_command, redacted_url
from fleet_worker.settings import Settings
from fleet_worker.setup.config_sources import DEFAULT, Sources


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting: its place as ("router", "timeout"), its value, without secrets, and where that comes from."""

    place: tuple[str, ...]
    value: Any
    source: str


def entries(settings: Settings) -> list[Entry]:
    """Return all settings of this process, those of one table together."""
    found = list(_of_group((), settings, Sources()))
    order = {table: number for number, table in enumerate(dict.fromkeys(entry.place[:-1] for entry in found))}
    return sorted(found, key=lambda entry: order[entry.place[:-1]])


def _of_group(place: tuple[str, ...], group: BaseModel, sources: Sources) -> Iterator[Entry]:
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        inner = (*place, name)
        if isinstance(value, BaseModel):
            yield from _of_group(inner, value, sources)
        elif isinstance(value, dict) and any(isinstance(each, BaseModel) for each in value.values()):
            for key, each in value.items():
                yield from _of_group((*inner, key), each, sources)
        else:
            yield Entry(inner, _shown(name, value), sources.of(inner, _aliases(field)))


def _aliases(field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [each for each in alias.choices if isinstance(each, str)] if isinstance(alias, AliasChoices) else []


def _shown(name: str, value: Any) -> Any:
    """Return a value as TOML and JSON have it, without what is secret in it."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if name == "serve" and value:
        return redacted_command(value)
    if isinstance(value, dict):
        return {key: _shown(key, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(name, each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return redacted_url(value) if isinstance(value, str) and "://" in value else value


def as_toml(found: list[Entry]) -> str:
    """Return them as a file, with the source of each value as a comment."""
    path = config_path()
    lines = [f"# In force here. {f'The file is {path.absolute()}' if path else 'No file is named'}."]
    for table, rows in groupby(found, lambda entry: entry.place[:-1]):
        if table:
            lines += ["", f"[{_dotted(table)}]"]
        lines += map(_line, rows)
    return "\n".join(lines) + "\n"


def _line(entry: Entry) -> str:
    name = _dotted(entry.place[-1:])
    if entry.value is None:
        return f"# {name} is not set"
    comment = "# " if name in NEED_SERVE and entry.source == DEFAULT else ""  # not allowed without `serve`
    return f"{comment}{name} = {_value(entry.value)}  # {entry.source}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{_dotted((key,))} = {_value(each)}" for key, each in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return str(tomlkit.item(value).as_string())


def _dotted(place: tuple[str, ...]) -> str:
    return ".".join(tomlkit.key(part).as_string() for part in place)


def as_json(found: list[Entry]) -> str:
    """Return them as an object: the value and the source of each, by its place as in `router.timeout`."""
    path = config_path()
    settings = {_dotted(entry.place): {"value": entry.value, "source": entry.source} for entry in found}
    return json.dumps({"file": str(path.absolute()) if path else None, "settings": settings}, ensure_ascii=False)
