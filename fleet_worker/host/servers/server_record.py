"""The file that tells the next `fleet-worker up` which process is the server of an instance."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from pydantic import TypeAdapter, ValidationError

from fleet_worker.host import private_file
from fleet_worker.host.servers.process_family import is_alive

MOST_BYTES = 10_000
NEAR = 1.0
"""Seconds by which the start of one process may differ: Linux computes it from the clock, which may be corrected."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, also after its id was given to another one."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> Identity:
        """Raises `psutil.Error` if there is no such process."""
        return cls(pid, psutil.Process(pid).create_time())

    def process(self) -> psutil.Process | None:
        """Return it if it has not ended."""
        try:
            found = psutil.Process(self.pid)
            return found if abs(found.create_time() - self.created) < NEAR and is_alive(found) else None
        except (psutil.Error, ValueError, OverflowError):
            return None


@dataclass(frozen=True, slots=True)
class ServerRecord:
    server: Identity
    guard: Identity
    fingerprint: str
    """Of its command."""
    mark: str
    """Its variable `FLEET_SERVER`."""


_RECORD: TypeAdapter[ServerRecord] = TypeAdapter(ServerRecord)


def read(path: Path) -> ServerRecord | None:
    """Return what the file holds; None if there is none, or it is damaged."""
    try:
        with path.open("rb") as file:
            return _RECORD.validate_json(file.read(MOST_BYTES))
    except (OSError, ValidationError):
        return None


def write(path: Path, record: ServerRecord) -> None:
    """Replace the file; raises `OSError`."""
    private_file.replace(path, json.dumps(asdict(record)).encode())
