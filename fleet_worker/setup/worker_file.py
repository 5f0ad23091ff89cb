"""Writes worker.toml: the configuration of a mini, with comments as a person would write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class WorkerInstance:
    """One instance: `base_url` of a server that runs, or the command line of one that `up` runs."""

    base_url: str | None = None
    serve: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    """The backend of each model, by public name."""
    concurrency: int = 4
    embeds: bool = False
    """Whether its models embed, instead of chatting."""


@dataclass(frozen=True, slots=True)
class WorkerFile:
    """What stands in the file."""

    broker_url: str
    host: str | None = None
    broker_ca: Path | None = None
    instances: Mapping[str, WorkerInstance] = field(default_factory=dict)

    def text(self) -> str:
        """Return the TOML."""
        return ""


def write(path: Path, text: str, *, force: bool = False) -> None:
    """Write a file that only its owner may read, all of it or nothing, and create its folder.

    Raises:
        ConfigurationError: it exists, unless `force` is given, or it cannot be written.
    """
