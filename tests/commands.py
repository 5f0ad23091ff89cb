"""`fleet-worker` in the process of the test: its entry point, with a command line and standard streams of its own."""

import io
import os
import shlex
import sys
from dataclasses import dataclass

import pytest

from fleet_worker.cli import main


@dataclass
class Done:
    """As `subprocess.run` returns it."""

    returncode: int
    stdout: str
    stderr: str


def fleet_worker(line, given=b""):
    """Run a command to its end; `given` is its standard input. Not for one that needs signals of its own."""
    given = given.encode() if isinstance(given, str) else given or b""
    streams = {"stdin": io.TextIOWrapper(io.BytesIO(given), "utf-8")}
    streams |= {name: io.TextIOWrapper(io.BytesIO(), "utf-8") for name in ("stdout", "stderr")}
    with pytest.MonkeyPatch.context() as patched:
        given_file = os.environ.get("FLEET_CONFIG")
        patched.setenv("FLEET_CONFIG", given_file or "")  # --config sets it, which is undone at the end
        if given_file is None:
            del os.environ["FLEET_CONFIG"]
        for name, value in {"argv": ["fleet-worker", *shlex.split(line)], **streams}.items():
            patched.setattr(sys, name, value)
        with pytest.raises(SystemExit) as end:
            main()
    said = []
    for name in ("stdout", "stderr"):
        streams[name].flush()
        said.append(streams[name].buffer.getvalue().decode())
    return Done(end.value.code or 0, *said)
