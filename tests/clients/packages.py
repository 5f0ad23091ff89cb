"""The packages of npm that clients are, in a folder outside the repository."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

INSTALL_WITHIN = 600.0


def install(folder: Path, names: Iterable[str], *, newest: bool) -> dict[str, str]:
    """Install what is missing, or with `newest` all anew; return the version of each package."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "package.json"
    if not manifest.exists():
        manifest.write_text(json.dumps({"name": "clients", "private": True}), "utf-8")
    wanted = [name for name in names if newest or not _package(folder, name).exists()]
    if wanted:
        tagged = [f"{name}@latest" for name in wanted]
        command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel", "error", *tagged]
        subprocess.run(command, cwd=folder, check=True, timeout=INSTALL_WITHIN)
    return {name: json.loads(_package(folder, name).read_text("utf-8"))["version"] for name in names}


def _package(folder: Path, name: str) -> Path:
    return folder / "node_modules" / name / "package.json"
