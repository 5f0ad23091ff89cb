"""The packages that clients are, of npm and of PyPI, in a folder outside the repository."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.clients.client import Client

INSTALL_WITHIN = 600.0


def install(folder: Path, clients: Sequence[Client], *, newest: bool) -> dict[str, str]:
    """Install what is missing, or with `newest` all anew; return the version of each package."""
    folder.mkdir(parents=True, exist_ok=True)
    of_npm = sorted({name for client in clients if not client.python for name in client.packages})
    of_pypi = sorted({name for client in clients if client.python for name in client.packages})
    return {
        **_installed(folder, of_npm, _npm_versions, _npm_install, newest=newest),
        **_installed(folder / "python", of_pypi, _pypi_versions, _pypi_install, newest=newest),
    }


def _installed(
    folder: Path,
    names: Sequence[str],
    versions: Callable[[Path], dict[str, str]],
    command: Callable[[Path, Iterable[str]], None],
    *,
    newest: bool,
) -> dict[str, str]:
    present = versions(folder) if names else {}
    if missing := [name for name in names if newest or name not in present]:
        command(folder, missing)
        present = versions(folder)
    return {name: present[name] for name in names}


def _npm_install(folder: Path, names: Iterable[str]) -> None:
    manifest = folder / "package.json"
    if not manifest.exists():
        manifest.write_text(json.dumps({"name": "clients", "private": True}), "utf-8")
    command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel", "error"]
    _run([*command, *(f"{name}@latest" for name in names)], folder)


def _npm_versions(folder: Path) -> dict[str, str]:
    if not (folder / "package.json").exists():  # npm would look into the folders above
        return {}
    listed = subprocess.run(["npm", "ls", "--depth", "0", "--json"], cwd=folder, capture_output=True, text=True)
    found = json.loads(listed.stdout or "{}").get("dependencies", {})
    return {name: about["version"] for name, about in found.items() if "version" in about}


def _pypi_install(folder: Path, names: Iterable[str]) -> None:
    if not folder.exists():
        _run([sys.executable, "-m", "venv", str(folder)], folder.parent)
    _run([str(_python(folder)), "-m", "pip", "install", "-q", "--upgrade", *names], folder)


def _pypi_versions(folder: Path) -> dict[str, str]:
    if not _python(folder).exists():
        return {}
    command = [str(_python(folder)), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return {each["name"]: each["version"] for each in json.loads(listed.stdout)}


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, timeout=INSTALL_WITHIN, stdout=sys.stderr)
