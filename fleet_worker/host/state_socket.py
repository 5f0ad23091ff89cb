"""Unix sockets in `state_dir`, over which the processes of one host talk."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from fleet_worker.errors import ConfigurationError

LONGEST_PATH = 100
"""Bytes of a Unix socket's path: macOS allows 104, Linux 108."""


def path_of(state_dir: Path, name: str) -> Path:
    """Return the path of the socket of this name.

    Raises:
        ConfigurationError: it is too long for a Unix socket.
    """
    path = state_dir / f"{name}.sock"
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigurationError("state_dir: the path is too long for a socket in it, choose a shorter one")
    return path


def listen(path: Path, *, make_free: Callable[[Path], None], backlog: int) -> socket.socket:
    """Return a socket that listens there, for this user only. `make_free` removes an earlier one at the path.

    Raises:
        ConfigurationError: it cannot be created; or what `make_free` raises.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_free(path)
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(backlog)
    except OSError as error:
        listening.close()
        raise ConfigurationError(f"state_dir: {path} cannot be created: {error.strerror}") from None
    except BaseException:
        listening.close()
        raise
    return listening
