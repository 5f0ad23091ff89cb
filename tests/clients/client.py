"""A client: a program by others that is run against a gateway."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fleet_worker.host.child_process import kill_group


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
    """The model of each role: `text` answers with text, `json` as its response_format asks for, and that with the name
    of a client calls the tools of this client. A role without a model is not tried."""
    packages: Path
    """The folder of what is installed."""
    folder: Path
    """An empty one, for what the client writes."""
    patience: float
    """Seconds that one program may take."""

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        """Run a program to its end; return what it printed. Raises `Failed` if it exits with another code than 0."""
        return "".join(self.lines(command, env))

    def lines(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[str]:
        """As `run`, line by line, each when it is printed."""
        around = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LANG": "C.UTF-8", "NO_COLOR": "1"}
        with tempfile.TemporaryFile("w+") as told, self._limited(command, {**around, **(env or {})}, told) as process:
            printed = []
            for line in process.stdout:
                printed.append(line)
                yield line
            code = process.wait()
            told.seek(0)
            if code < 0:
                raise Failed(f"it did not end within {self.patience:g} s")
            if code:
                raise Failed(f"exit code {code}: {(told.read() or ''.join(printed)).strip()[-600:]}")

    @contextmanager
    def _limited(
        self, command: Sequence[str], env: Mapping[str, str], told: IO[str]
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a program and kill it after a while, and all that it started."""
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            start_new_session=True,
        )
        end = threading.Timer(self.patience, kill_group, (process.pid,))
        end.start()
        try:
            with process:
                yield process
        finally:
            end.cancel()
            kill_group(process.pid)

    def run_script(self, script: str) -> Iterator[Result]:
        """Run a script beside this file. It prints a line of JSON for each check: `check`, `passed`, `said`."""
        runs = "node" if script.endswith(".cjs") else str(self.packages / "python" / "bin" / "python")
        env = {"NODE_PATH": str(self.packages / "node_modules"), "URL": self.url, "KEY": self.key}
        env["MODELS"] = json.dumps(dict(self.models))
        for line in self.lines([runs, str(Path(__file__).with_name(script))], env):
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
    also: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Other simulated models, whose names make the client work otherwise, and the tools that they call."""
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
