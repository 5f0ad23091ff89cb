"""The configuration file: where it is, what it holds, and the text of the error if that is wrong."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fleet_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

MOST_BYTES = 1_000_000
"""Bytes of the file; a larger one is no configuration."""
DEFAULT = Path("~/fleet/worker.toml")
"""The file that `init`, `join` and `quickstart` write, and that all commands read, if no other is named."""
NAMED_BY = "--config or FLEET_CONFIG"
"""What names the file, for texts of errors."""

Place = tuple[int | str, ...]
"""Of a setting, as ("router", "timeout") or ("instances", "local", "base_url")."""


def config_path() -> Path | None:
    """Return the path that FLEET_CONFIG or `--config` names; None if there is none."""
    name = os.environ.get("FLEET_CONFIG")
    return Path(os.path.expanduser(name)) if name else None


def use(name: str, *, exists: bool = True) -> None:
    """Make `name` the configuration file of this process and of those that it starts, as FLEET_CONFIG does.

    Raises:
        ConfigurationError: it cannot be read, unless it need not exist.
    """
    os.environ["FLEET_CONFIG"] = name
    path = Path(os.path.expanduser(name))
    try:
        if exists:
            path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        reason = getattr(error, "strerror", None) or "that is no path"
        raise ConfigurationError(f"the file {path} of {NAMED_BY} cannot be read: {reason}") from None


def use_default() -> None:
    """Make DEFAULT the configuration file, if it exists and FLEET_CONFIG is not set, not even to an empty text."""
    if "FLEET_CONFIG" not in os.environ and DEFAULT.expanduser().is_file():
        os.environ["FLEET_CONFIG"] = str(DEFAULT.expanduser())


def read() -> dict[str, Any]:
    """Return the content of the configuration file, empty if there is none; raises `ConfigurationError`."""
    path = config_path()
    return read_toml(path, MOST_BYTES, of=NAMED_BY) if path else {}


def tables(name: str) -> dict[str, Any]:
    """Return the tables of the file that stand under a name, as `instances`; none if that is something else.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    found = read().get(name)
    return found if isinstance(found, dict) else {}


def read_toml(path: Path, most_bytes: int, *, of: str) -> dict[str, Any]:
    """Return the content of a TOML file; which the setting `of` names; raises `ConfigurationError`."""
    try:
        with path.open("rb") as file:
            text = file.read(most_bytes + 1)
        if len(text) > most_bytes:
            raise ConfigurationError(f"the file {path} of {of} is larger than {most_bytes:,} bytes")
        return tomllib.loads(text.decode("utf-8-sig"))  # some editors of Windows begin a file with U+FEFF
    except OSError as error:
        raise ConfigurationError(f"the file {path} of {of} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"the file {path} of {of} is not valid TOML: {error}") from None


def explain(error: ValidationError, settings: type[BaseModel]) -> str:
    """Return the texts of all faults in one line."""
    return "; ".join(text for _, text in faults(error, settings))


def faults(error: ValidationError, settings: type[BaseModel]) -> list[tuple[Place, str]]:
    """Return the place of each fault in `settings`, and its text, which begins with the place.

    No text has a value: one may be a key.
    """
    found = error.errors(include_url=False, include_context=False)
    return [(fault["loc"], _text(fault, settings)) for fault in found]


def _text(fault: ErrorDetails, settings: type[BaseModel]) -> str:
    unknown = fault["type"] == "extra_forbidden"
    reason = _unknown_key(fault["loc"], settings, fault["input"]) if unknown else _reason(fault["type"], fault["msg"])
    return ": ".join(filter(None, [".".join(map(str, fault["loc"])), reason]))


_NEEDED = {
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "missing": "is missing",
}
"""Our words for what pydantic says of a value of a wrong kind."""


def _reason(kind: str, text: str) -> str:
    if kind == "too_short" and (least := re.match(r"Value should have at least (\d+) items", text)):  # of a secret
        return f"must have at least {least[1]} characters"
    return _NEEDED.get(kind) or text.removeprefix("Value error, ").replace("Input should be", "must be", 1)


def _unknown_key(place: Place, settings: type[BaseModel], value: object) -> str:
    group: Any = settings
    for part in place[:-1]:
        fields = getattr(group, "model_fields", None)  # otherwise it is a dictionary of groups
        group = fields[part].annotation if fields else get_args(group)[1]
    known = nearest(str(place[-1]), group.model_fields)
    if not known and place[2:3] == ("models",) and isinstance(value, dict):  # [instances.local.models.qwen3.5-14b]
        known = f'; a name with a dot needs quotes: [instances.{place[1]}.models."{place[3]}.{place[4]}"]'
    return f"unknown key{known}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error text that names the known name most like `name`; empty if none is like it."""
    names = list(known)
    found = [each for each in names if each.startswith(f"{name}_")] or difflib.get_close_matches(name, names, n=1)
    return f", the nearest that exists is {found[0]}" if found else ""
