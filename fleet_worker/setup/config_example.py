"""The example files of the folder config/, which this package holds as links, and the wheel as files."""

from __future__ import annotations

from importlib.resources import files

NAMES = ("worker", "router")


def example(name: str) -> str:
    """Return the text of an example, by one of `NAMES`."""
    return (files("fleet_worker.setup") / "examples" / f"{name}.toml").read_text("utf-8")
