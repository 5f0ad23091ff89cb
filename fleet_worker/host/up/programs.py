"""How `fleet-worker up` starts a node, the gateway and the embedded broker, and how long all of it may take to end."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fleet_worker.host.child_process import python
from fleet_worker.host.embedded_broker import broker_command
from fleet_worker.host.file_lock import file_name, open_lock
from fleet_worker.host.parent_pipe import NODE_LOCK, PARENT_PIPE
from fleet_worker.host.servers.managed_server import GRACE, ManagedServer
from fleet_worker.host.servers.restart_policy import Pace
from fleet_worker.host.servers.server_command import ServerCommand
from fleet_worker.settings import Settings

ALLOCATOR = {"MALLOC_ARENA_MAX": "1"}
"""For Linux: otherwise glibc keeps freed memory for each of the many threads of a node."""
GATEWAY = "gateway"
BROKER = "up.broker"
"""Its name in the log: no instance can have it."""
BROKER_PACE = Pace(longest=30.0, most_deaths=1_000_000)
"""It is never given up: without it nothing works."""
ANSWERS_LEAVE_WITHIN = 10.0
"""Seconds beyond its grace that the gateway has to end."""


def node_command(node_name: str) -> list[str]:
    # -P: do not import a celery.py from the current folder
    return python("-P", "-m", "fleet_worker.node", node_name)


def gateway_command() -> list[str]:
    return python("-P", "-m", "fleet_worker", "gateway")


def gateway_grace(settings: Settings) -> float:
    return settings.gateway.drain_grace + ANSWERS_LEAVE_WITHIN


def ends_within(settings: Settings) -> float:
    """Return the seconds in which a stopped `up` has ended: first nodes and gateway, then servers, then the broker."""
    graces = [settings.worker.killed_after, gateway_grace(settings) if settings.up.gateway else 0.0]
    servers = GRACE if any(instance.serve for instance in settings.instances.values()) else 0.0
    return max(graces) + servers + (GRACE if settings.up.broker else 0.0)


def embedded_broker(settings: Settings) -> ManagedServer:
    """Return the broker of `up.broker`: a server as those of the instances, which another `up` can take over.

    Raises:
        ConfigurationError: it cannot be started with these settings.
    """
    port = urlsplit(settings.broker_url).port or 6379
    program, file = broker_command(settings)
    # One that runs with another configuration, as an old password, is not taken over.
    configuration = {"BROKER_CONFIGURATION": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    command = ServerCommand((program, file), configuration, "127.0.0.1", port, port_setting="broker_url")
    return ManagedServer(BROKER, command, folder=settings.state_dir, host=settings.host, pace=BROKER_PACE)


class Launcher:
    """Starts processes that lead their own group, hold a lock of their name until they end, and end with `up`, since
    they inherit `pipe`.
    """

    def __init__(self, pipe: int, command: Callable[[str], Sequence[str]]) -> None:
        self.settings: Settings
        """Those that count now."""
        self.broker: ManagedServer | None = None
        """It lives until all that was started has ended, also if `up` is killed."""
        self._pipe = pipe
        self._command = command

    def node(self, name: str, inherited: tuple[int, ...]) -> subprocess.Popen[bytes]:
        return self._start(name, self._command(name), inherited)

    def gateway(self, name: str) -> subprocess.Popen[bytes]:
        return self._start(name, gateway_command(), ())

    def _start(self, name: str, command: Sequence[str], inherited: tuple[int, ...]) -> subprocess.Popen[bytes]:
        if self.broker:
            inherited = (*inherited, self.broker.guard_fd)
        with open_lock(self.settings.state_dir / f"node-{file_name(name)}.lock") as lock:
            return subprocess.Popen(  # noqa: S603 - our own command line
                command,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                env={**ALLOCATOR, **os.environ, PARENT_PIPE: str(self._pipe), NODE_LOCK: str(lock.fileno())},
                pass_fds=(self._pipe, lock.fileno(), *inherited),
                start_new_session=True,
            )
