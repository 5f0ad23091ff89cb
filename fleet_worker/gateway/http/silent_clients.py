"""Clients that vanished without a word, as a computer that sleeps does: TCP finds out."""

from __future__ import annotations

import socket
from typing import Any

ASK_AFTER = 30
"""Seconds of silence after which TCP asks whether the client is still there."""
ASK_EVERY = 10
"""Seconds between two tries."""
TRIES = 3
"""Without an answer to any of them the connection is lost."""


def ask_silent_client(connection: Any) -> None:
    """Have this connection end if its client has vanished. A Unix socket needs nothing: its end is always seen."""
    if connection is None or connection.family == getattr(socket, "AF_UNIX", None):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # macOS calls it TCP_KEEPALIVE
    if idle is not None:
        connection.setsockopt(socket.IPPROTO_TCP, idle, ASK_AFTER)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ASK_EVERY)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, TRIES)
