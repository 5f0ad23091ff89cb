"""Who listens on a port of this host."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from typing import Any

import psutil

LONGEST_CONNECT = 0.05
"""Seconds. The system itself accepts for a program on this host, at once, unless too many connections wait for it."""


def accepts(host: str, port: int) -> bool:
    """Return whether a server accepts connections there."""
    return any(_connects(family, address, port) for family, address in _addresses(host))


def is_taken(host: str, port: int) -> bool:
    """Return whether a server could not listen there: another one does, or will as soon as it is ready."""
    return accepts(host, port) or any(_is_bound(family, address, port) for family, address in _addresses(host))


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    if host == "localhost":
        return [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    return [(socket.AF_INET6 if ":" in host else socket.AF_INET, host)]


def _connects(family: socket.AddressFamily, address: str, port: int) -> bool:
    try:
        with socket.socket(family) as probe:
            probe.settimeout(LONGEST_CONNECT)
            probe.connect((address, port))
            # Nobody listens, and the system has chosen this very port for our own end: it is connected to itself.
            return bool(probe.getsockname() != probe.getpeername())
    except OSError:
        return False


def _is_bound(family: socket.AddressFamily, address: str, port: int) -> bool:
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
            probe.bind((address, port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def owner(port: int) -> psutil.Process | None:
    """Return the process that listens on a port of this host, or else one with a connection from that port: the system
    gives any port above the first thousands to a connection. None if it is another user's. Takes milliseconds.
    """
    try:
        found = [each for each in psutil.net_connections("tcp") if _is_at(each, port)]
    except psutil.Error:  # macOS shows all connections to root only
        return _owner_among(psutil.process_iter(), port)
    for each in sorted(found, key=_listens, reverse=True):
        try:
            if each.pid:
                return psutil.Process(each.pid)
        except psutil.Error:
            continue
    return None


def _owner_among(processes: Iterable[psutil.Process], port: int) -> psutil.Process | None:
    connects = None
    for process in processes:
        try:
            found = [each for each in process.net_connections("tcp") if _is_at(each, port)]
        except (psutil.Error, OSError):
            continue
        if any(_listens(each) for each in found):
            return process
        if found:
            connects = process
    return connects


def _is_at(connection: Any, port: int) -> bool:
    return bool(connection.laddr) and connection.laddr.port == port


def _listens(connection: Any) -> bool:
    return bool(connection.status == psutil.CONN_LISTEN)


def described(process: psutil.Process | None) -> str:
    """Return the name and the id of a process; of an interpreter also the name of what it runs."""
    if process is None:
        return "a program of another user"
    try:
        name, words = process.name(), process.cmdline()
    except psutil.Error:
        return f"process {process.pid}"
    if "-m" in words:
        words = words[words.index("-m") :]
    runs = next((os.path.basename(word) for word in words[1:] if not word.startswith("-")), "")
    shown = f"{name} {runs}" if name.lower().startswith("python") and "-c" not in words else name
    return f"{''.join(filter(str.isprintable, shown)).rstrip()[:80]}, pid {process.pid}"
