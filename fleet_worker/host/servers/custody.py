"""Whose a server is: who ends it if `fleet-worker up` is killed, and how the next `up` finds it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from pathlib import Path

import psutil

from fleet_worker.host.file_lock import file_name
from fleet_worker.host.servers import server_record
from fleet_worker.host.servers.guard import Guard, end_guard
from fleet_worker.host.servers.process_family import is_marked, kill_all, marked, may_lead
from fleet_worker.host.servers.server_process import ServerProcess
from fleet_worker.host.servers.server_record import Identity, ServerRecord
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)


class Custody:
    """The guard, the record and the mark of the server of one instance, which has one process at a time."""

    def __init__(self, instance: str, *, folder: Path, host: str) -> None:
        self._name = name = file_name(f"{instance}@{host}")
        self._path = folder / f"server-{name}.json"
        self._owner = hashlib.sha256(f"{folder.resolve()} {name}".encode()).hexdigest()[:16]
        self.mark = f"{self._owner}/{secrets.token_hex(8)}"
        """The mark of servers that are started here. It begins with what those of each `up` have in common. The guard
        of an earlier `up` kills by the whole of it, so it cannot meet a server of this one."""
        self._guard: Guard | None = None
        self._kept: ServerProcess | None = None

    @classmethod
    def of(cls, settings: Settings, instance: str) -> Custody:
        return cls(instance, folder=settings.state_dir, host=settings.host)

    @property
    def output_path(self) -> Path:
        """The pipe that the server prints into."""
        return self._path.with_suffix(".out")

    def guard(self) -> Guard:
        """Return the guard; raises `OSError` if it cannot be started."""
        self._guard = self._guard or Guard()
        return self._guard

    def keep(self, process: ServerProcess) -> None:
        """Have it end with this process, and let the next `up` know of it."""
        self._kept = process
        try:
            guard = self.guard()
            guard.watch(process.pid, process.mark)
            identity, of_guard = Identity.of(process.pid), Identity.of(guard.pid)
            server_record.write(self._path, ServerRecord(identity, of_guard, process.fingerprint, process.mark))
        except (OSError, psutil.Error) as error:
            log.warning("no other fleet-worker up could take over the server %s: %s", self._name, error)

    def check(self) -> None:
        """Start another guard if somebody has killed it."""
        if self._guard and self._guard.ended:
            log.warning("somebody has killed the guard of the server %s, another one starts", self._name)
            self._guard.close()
            self._guard = None
            if self._kept:
                self.keep(self._kept)

    def release(self) -> None:
        """The server has ended."""
        self._kept = None
        if self._guard:
            self._guard.release()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def take_over(self) -> ServerProcess | None:
        """Return the server of an earlier `up` that was killed, if it still runs. Kill what is left of one that has no
        leader any more, or of which nothing is written.
        """
        record = server_record.read(self._path)
        if record and not record.mark.startswith(f"{self._owner}/"):
            record = None  # that of another folder, or damaged
        if record and (guard := record.guard.process()):
            end_guard(guard)  # it would end the server together with the node of that `up`
        leader = record.server.process() if record else None
        if record and leader and not may_lead(leader, record.mark):
            leader = None
        if not record or not leader:
            kill_all(marked(self._owner))
            return None
        process = ServerProcess.adopt(leader, record.mark, record.fingerprint)
        self.mark = record.mark
        self.keep(process)
        return process

    def owns(self, process: psutil.Process) -> bool:
        """Tell whether a process belongs to this server, or to an earlier one of its instance."""
        try:
            return is_marked(process, self._owner)
        except (psutil.Error, OSError):
            return False

    def close(self) -> None:
        if self._guard:
            self._guard.close()
            self._guard = None
