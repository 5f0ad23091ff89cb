"""What this host is called: in the fleet, and by other hosts of its network."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from contextlib import closing, suppress
from typing import Any

import psutil

from fleet_worker.settings import as_host
from fleet_worker.urls import is_loopback


def own_host() -> str:
    """Return the name that this host has in a fleet if nothing else is said."""
    return as_host(_bonjour_name() or socket.gethostname().split(".")[0])


def own_address() -> str:
    """Return the name or address by which other hosts reach this one, as far as that can be known here.

    The name that a Mac announces in its network stays, while DHCP may change its address; elsewhere names of that kind
    may not work.
    """
    name = _bonjour_name()
    return f"{name}.local" if name else lan_address() or socket.gethostname()


def _bonjour_name() -> str:
    """Return the name that a Mac announces, which no other one in its network has; empty elsewhere."""
    scutil = shutil.which("scutil") if sys.platform == "darwin" else None
    if not scutil:
        return ""
    said = subprocess.run([scutil, "--get", "LocalHostName"], capture_output=True, text=True, timeout=5, check=False)  # noqa: S603 - no input in it
    return said.stdout.strip()


def lan_address() -> str | None:
    """Return the address of this host in its network; None without a network."""
    with suppress(OSError), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses the address from which it would be sent
        return str(probe.getsockname()[0])
    found = [each.address for name in _interfaces() for each in psutil.net_if_addrs().get(name, ()) if _is_usable(each)]
    return found[0] if found else None


def _interfaces() -> list[str]:
    """Return the names of all that are up: a network need not lead anywhere else."""
    return [name for name, state in psutil.net_if_stats().items() if state.isup]


def _is_usable(found: Any) -> bool:
    return found.family == socket.AF_INET and not is_loopback(found.address)
