"""What the registry node learns from the `fleet-worker up` of its host: how the managed MLX servers are, and whether
the owner needs the machine. Without an `up` it is nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fleet_worker.host.up_socket import UpLink
from fleet_worker.protocol.host_messages import FromUp, HostStatus, ServerStatus, Watch
from fleet_worker.protocol.status import InstanceStatus, Status

_TROUBLES = ("starting", "stopping", "waiting", "quarantined", "blocked")
"""Stages of a server that say more than what its node sees."""


class HostWatch:
    """Calls `changed`, in a thread of its own, for another stage or reason of a server, and if the owner comes or
    leaves; not for a figure."""

    def __init__(self, path: Path, host_name: str, changed: Callable[[], None]) -> None:
        self._path = path
        self._host_name = host_name
        self._changed = changed
        self._link: UpLink | None = None
        self.host = HostStatus()
        """As told last; empty if there is no `up`."""
        self._since: dict[str, tuple[str, float]] = {}
        """The stage of each server, and since when (time.monotonic()) it has that."""

    def start(self) -> None:
        self._link = UpLink(self._path, self._receive, lost=self._forget)
        self._link.send(Watch())
        self._link.start()

    def close(self) -> None:
        if self._link:
            self._link.close()

    def completed(self, instance: InstanceStatus) -> InstanceStatus:
        """Return what its node reports, with what is known of its server."""
        server = self._server(instance.name)
        if server is None:
            return instance
        known = replace(instance, server_stage=server.stage, server_deaths=server.deaths, server_memory=server.memory)
        says_more = instance.status not in ("available", "drained", "away") and server.stage in _TROUBLES
        return replace(known, reason=self._described(server)) if says_more else known

    def without_node(self, instance: str) -> tuple[Status, str] | None:
        """Return the status and the reason of an instance whose node does not report; None if nothing is known."""
        server = self._server(instance)
        if self.host.away:
            return "away", self.host.away
        if server is None or server.stage not in _TROUBLES:
            return None
        return "starting" if server.stage == "starting" else "unavailable", self._described(server)

    def _server(self, instance: str) -> ServerStatus | None:
        return next((each for each in self.host.servers if each.instance == instance), None)

    def _described(self, server: ServerStatus) -> str:
        """Return in words why a server does not serve, and what to do."""
        reason, name = server.reason, server.instance
        match server.stage:
            case "starting":
                _, since = self._since.get(name, ("", time.monotonic()))
                told = f" ({reason})" if reason else ""
                return f"its MLX server has been starting for {time.monotonic() - since:.0f} s{told}"
            case "quarantined":
                return (
                    f"its MLX server is quarantined after {server.deaths} deaths, the last one {reason}; "
                    f"fleet-worker restart {name}@{self._host_name} --server tries it now"
                )
            case "blocked":
                return f"its MLX server cannot start: {reason}; end that program, or set another base_url"
            case "waiting":
                return f"its MLX server {reason}; it is started again soon"
            case _:
                return f"its MLX server is being stopped: {reason}"

    def _receive(self, message: FromUp) -> None:
        if isinstance(message, HostStatus):
            self._take(message)

    def _forget(self) -> None:
        self._take(HostStatus())

    def _take(self, host: HostStatus) -> None:
        now, before = time.monotonic(), self._since
        stages = {each.instance: each.stage for each in host.servers}
        self._since = {
            name: before[name] if name in before and before[name][0] == stage else (stage, now)
            for name, stage in stages.items()
        }
        old, self.host = self.host, host
        if _told_at_once(old) != _told_at_once(host):
            self._changed()


def _told_at_once(host: HostStatus) -> tuple[object, ...]:
    return host.away, *((each.instance, each.stage, each.reason) for each in host.servers)
