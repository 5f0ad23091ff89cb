"""The folder of a model on this machine: what a server was started with, or the Hugging Face cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from fleet_worker.hugging_face import hub_folder

_MOST_FOLDERS = 100
"""Of those that a server reports."""


def folders_of(backend: str, reported: Iterable[str]) -> Iterator[Path]:
    """Yield the folders in which a model may be that its server calls `backend`; they need not exist.

    The folder of `default_model` is the one in the server's command line, which is the absolute path among the models
    that the server `reported`. A server may report any name, "/etc/passwd" too: read only files of models in them.
    """
    names = [backend]
    if backend == "default_model":
        names = [name for name in reported if name.startswith("/")][:_MOST_FOLDERS]
    return (folder_of(name) for name in names)


def folder_of(name: str) -> Path:
    """Return the folder of this name, or else the one of a repository of this name in the cache."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a NUL
        path = Path(name).expanduser()
        if path.is_dir():
            return path
    return cached_folder_of(name)


def cached_folder_of(repository: str, hub: Path | None = None) -> Path:
    """Return the folder of the Hugging Face cache for the main revision of this repository; it may not exist."""
    model = (hub or hub_folder()) / f"models--{repository.replace('/', '--')}"
    return model / "snapshots" / (text_of(model / "refs" / "main") or "none").strip()


def text_of(path: Path) -> str | None:
    """Return what a file holds; None if it is no file of text."""
    try:
        return path.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError, RuntimeError):  # not a valid path, or of an unknown user
        return None
