"""Where the gateway listens, and how many connections this process may have there."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that wait to be accepted."""
OTHER_FILES = 200
"""Open files of this process that are no connections of clients."""
MACS_ALLOW = 10_240
"""Open files of a process on a Mac without any further setting, whatever it says."""


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """Yield a socket that is bound where the settings say."""
    path = settings.gateway.socket
    try:
        listener = _unix_socket(path) if path else _tcp_socket(settings.gateway.host, settings.gateway.port)
    except OSError as error:
        where = (
            f"gateway.socket {path}" if path else f"gateway.host {settings.gateway.host}, port {settings.gateway.port}"
        )
        raise ConfigurationError(f"{where}: cannot be used: {error.strerror or error}; choose another one") from None
    listener.listen(BACKLOG)
    try:
        yield listener
    finally:
        listener.close()
        if path:
            path.unlink(missing_ok=True)


def _tcp_socket(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return listener


def _unix_socket(path: Path) -> socket.socket:
    """Return a socket that only this user can reach. One that a killed gateway left behind is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    if path.is_socket() and listener.connect_ex(str(path)) != 0:
        path.unlink()
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    return listener


def address(settings: Settings, listener: socket.socket) -> str:
    """Return where the gateway can be reached, as a URL or the path of its socket."""
    if settings.gateway.socket:
        return f"unix:{settings.gateway.socket}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.gateway.cert else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def allow_connections(most: int) -> int:
    """Raise the limit of open files for `most` connections, and return how many are possible. On a Mac it is 256 at
    first.
    """
    wanted = most + OTHER_FILES
    given = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if each == resource.RLIM_INFINITY else each for each in given)
    for limit in (min(wanted, hard), min(wanted, hard, MACS_ALLOW)):
        if soft < limit:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), given[1]))
                soft = limit
    if soft >= wanted:
        return most
    possible = max(1, int(soft) - OTHER_FILES)
    log.warning("%d connections are possible: raise the limit of open files to %d for more", possible, wanted)
    return possible
