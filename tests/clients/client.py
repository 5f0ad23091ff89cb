"""A client: a program by others that is run against a gateway."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_WITHIN = 180.0


@dataclass(frozen=True)
class Result:
    """One thing that a client was asked to do."""

    check: str
    passed: bool
    said: str
    """What came of it, in a line."""


@dataclass(frozen=True)
class Target:
    """A gateway, and what clients need to use it."""

    url: str
    """Without a path."""
    key: str
    models: Mapping[str, str]
    """Which model plays which role: `text` answers with text, all others call the tools of the client of that name."""
    packages: Path
    """The folder of what is installed."""
    folder: Path
    """An empty one, for what the client writes."""

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None, stdin: str = "") -> str:
        """Run a program to its end; return what it printed. Raises `Failed` if it exits with another code than 0."""
        around = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LANG": "C.UTF-8", "NO_COLOR": "1"}
        try:
            process = subprocess.run(
                command,
                cwd=self.folder,
                env={**around, **(env or {})},
                input=stdin,
                capture_output=True,
                text=True,
                timeout=RUN_WITHIN,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{command[0]} did not end within {RUN_WITHIN:g} s") from None
        if process.returncode:
            raise Failed(f"exit code {process.returncode}: {(process.stderr or process.stdout).strip()[-600:]}")
        return process.stdout

    def run_script(self, script: str) -> Iterator[Result]:
        """Run a script beside this file. It prints a line of JSON for each check: `check`, `passed`, `said`."""
        runs = "node" if script.endswith(".cjs") else str(self.packages / "python" / "bin" / "python")
        env = {"NODE_PATH": str(self.packages / "node_modules"), "URL": self.url, "KEY": self.key}
        models = json.dumps(dict(self.models))
        printed = self.run([runs, str(Path(__file__).with_name(script))], {**env, "MODELS": models})
        for line in printed.splitlines():
            if line.startswith("{"):
                yield Result(**json.loads(line))


class Failed(Exception):
    """A client did not do what it should."""


@dataclass(frozen=True)
class Client:
    """`tool_calls` are what the simulated model of this client writes where it may call tools."""

    name: str
    packages: Sequence[str]
    """Of npm, or of PyPI if it is written in Python."""
    run: Callable[[Target], Iterator[Result]]
    tool_calls: Sequence[Mapping[str, Any]] = ()
    python: bool = False


def check(name: str, does: Callable[[], str]) -> Result:
    """Return what came of a check that returns a text, or raises `Failed`."""
    try:
        return Result(name, True, does())
    except Failed as failure:
        return Result(name, False, str(failure))


def expect(true: object, otherwise: object) -> None:
    if not true:
        raise Failed(f"unexpected: {otherwise}"[:600])
