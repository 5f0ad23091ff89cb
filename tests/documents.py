"""Reads the Markdown documents of this project for the tests that hold them against the code.

    python -m tests.documents

prints the tables of config/README.md as they have to be.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from fleet_worker.mlx.parameters import KINDS, TABLE
from fleet_worker.settings import Instance, Model, Settings

ROOT = Path(__file__).parents[1]
FOLDERS = ("config", "docker", "fleet_worker", "tests", ".github")
PATHS = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:(?<=\n\n)|^)(?: {4}.*\n?)+", re.MULTILINE)


def snippets(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [body for name, body in _FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return _INDENTED.sub("", _FENCE.sub("", text))


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """The names of the headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables(text: str, heading: str) -> list[list[list[str]]]:
    """The tables below a heading: the cells of each row, without the head."""
    below = re.split(rf"^#+ {re.escape(heading)}$", text, maxsplit=1, flags=re.MULTILINE)[1]
    section = re.split(r"^#", below, maxsplit=1, flags=re.MULTILINE)[0]
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()[2:]]
        for rows in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    ]


def commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """The words of each command that is to be typed, and whether it stands in a block, so has to be complete."""
    blocks = "\n".join([*snippets(text, "sh"), *_INDENTED.findall(_FENCE.sub("", text))])
    for line in blocks.replace("\\\n", " ").splitlines():
        for words in _typed(line):
            yield words, True
    for code in inline_code(text):
        for words in _typed(code):
            yield words, False


def _typed(line: str) -> Iterator[list[str]]:
    """Split a line of a shell into its commands, without the variables before them and the folders of programs."""
    words: list[str] = []
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        tokens = [*lexer, ";"]
    except ValueError:  # an output that is shown, not a command
        return
    for before, token in zip(["", *tokens], tokens, strict=False):
        if set(token) <= set("<>") or (before and set(before) <= set("<>")):  # from or to a file
            continue
        if set(token) <= set(";&|()"):
            if words:
                yield [words[0].rpartition("/")[2], *words[1:]]
            words = []
        elif words or not re.match(r"[A-Z_]+=", token):
            words.append(token)


# --- The settings, as config/README.md shows them


def settings_tables() -> dict[str, str]:
    """The table of each section of the configuration file, by the section's heading."""
    groups = {name: _group(field) for name, field in Settings.model_fields.items()}
    top = {name: field for name, field in Settings.model_fields.items() if not groups[name] and name != "instances"}
    tables = {"Top level": _table(_rows(top))}
    for name in ("router", "worker", "registry", "gateway", "availability"):
        tables[f"[{name}]"] = _table(_rows(groups[name].model_fields))
    tables["[instances.NAME]"] = _table(_rows(Instance.model_fields))
    tables['[instances.NAME.models."PUBLIC-NAME"]'] = _table(_rows(Model.model_fields))
    return tables


def parameters_table() -> str:
    """What each kind of server does with each parameter of a chat."""
    names = {row: re.sub(r"^([^:]+):?", r"`\1`", row) for row in TABLE}
    rows = ([names[row], *cells] for row, cells in TABLE.items())
    return _table(rows, ["parameter", *(f"`{kind}`" for kind in KINDS)])


def _table(rows: Iterable[list[str]], head: Sequence[str] = ("setting", "default", "allowed", "meaning")) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _rows(fields: dict[str, FieldInfo], prefix: str = "") -> Iterator[list[str]]:
    for name, field in fields.items():
        if group := _group(field):
            yield from _rows(group.model_fields, f"{prefix}{name}.")
        elif name != "models":
            meaning = " ".join((field.description or "").split())
            if isinstance(field.validation_alias, AliasChoices):
                others = [f"`{alias}`" for alias in field.validation_alias.choices if alias != name]
                meaning += f" Also called {', '.join(others)}."
            yield [f"`{prefix}{name}`", _default(field), _allowed(field), meaning]


def _group(field: FieldInfo) -> Any:
    """The group of settings that a field is, if it is one."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _default(field: FieldInfo) -> str:
    if field.default_factory:
        return "of this host"
    if field.default is None:
        return "not set"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value)}`"


def _allowed(field: FieldInfo) -> str:
    """The words that a text may be, or the bounds of a number."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if get_origin(kind) is Literal:
            return ", ".join(f"`{word}`" for word in get_args(kind))
    if field.annotation is bool:
        return "`true`, `false`"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign}\N{NO-BREAK SPACE}{getattr(each, name)}"
        for each in field.metadata
        for name, sign in signs.items()
        if hasattr(each, name)
    ]
    return ", ".join(bounds)


if __name__ == "__main__":
    for heading, rows in settings_tables().items():
        print(f"## {heading}\n\n{rows}\n")
    print(f"## Parameters of a chat\n\n{parameters_table()}\n")
