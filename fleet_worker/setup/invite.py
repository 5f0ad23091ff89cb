"""`fleet-worker invite`: makes the line with which another host joins the fleet of this one."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import subprocess
import sys
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlsplit

import psutil

from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings
from fleet_worker.setup.invitation import Invitation, Membership, Role
from fleet_worker.setup.single_use import make
from fleet_worker.urls import is_loopback, with_account, with_host


def invite(settings: Settings, role: Role = "mini", *, address: str = "", account: str = "") -> Invitation:
    """Return an invitation to the fleet of this host. `address`: that of the broker for other hosts, instead of the one
    in the settings; `account`: what they get instead of the account of this host, as USER:PASSWORD.

    Raises:
        ConfigurationError: other hosts cannot reach the broker.
        BrokerUnavailable: it does not answer.
    """
    url = _reachable(settings, address)
    ca = settings.broker_ca.read_text("utf-8") if settings.broker_ca else None
    membership = Membership(
        role=role,
        broker_url=with_account(url, account) if account else url,
        broker_ca=ca,
        max_body_bytes=settings.max_body_bytes,
        affinity=settings.router.affinity,
        affinity_secret=_affinity_secret(settings) if role == "router" else None,
    )
    other = lan_address() if url != settings.broker_url and not _is_address(urlsplit(url).hostname) else None
    common = {"broker_url": with_account(url, ""), "other_address": other, "broker_ca": ca}
    if made := make(settings, membership):
        return Invitation(id=made[0], secret=made[1], **common)
    return Invitation(membership=membership, **common)


def own_address() -> str:
    """Return the name or address by which other hosts reach this one, as far as that can be known here.

    The name that a Mac announces in its network stays, while DHCP may change its address; elsewhere names of that kind
    may not work.
    """
    if scutil := shutil.which("scutil") if sys.platform == "darwin" else None:
        command = [scutil, "--get", "LocalHostName"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603 - no input
        if name := said.stdout.strip():
            return f"{name}.local"
    return lan_address() or socket.gethostname()


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


def _reachable(settings: Settings, address: str) -> str:
    """Return broker_url as other hosts need it."""
    url = settings.broker_url
    if settings.up.broker:
        if not settings.up.address:
            raise ConfigurationError(
                "the broker of this fleet is for this host only: set up.address to the name of this host, make the "
                "gateway listen with gateway.host, and restart fleet-worker up"
            )
        return with_host(url, address or settings.up.address)
    if address:
        return with_host(url, address)
    if is_loopback(urlsplit(url).hostname or "localhost"):
        raise ConfigurationError("broker_url names this host only: give the name of the broker for others by --address")
    return url


def _affinity_secret(settings: Settings) -> str | None:
    secret = settings.router.affinity_secret
    return secret.get_secret_value() if secret else None


def _is_address(host: str | None) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(host or ""))
    return False
