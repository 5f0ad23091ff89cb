"""`fleet-worker invite`: makes the line with which another host joins the fleet of this one."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from urllib.parse import quote, urlsplit

from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings
from fleet_worker.setup.invitation import Invitation, Membership, Role
from fleet_worker.setup.own_names import lan_address
from fleet_worker.setup.single_use import VALID, deposit
from fleet_worker.urls import host_name, is_loopback, with_account, with_host


def invite(
    settings: Settings, role: Role = "mini", *, address: str = "", account: str = "", valid: float = VALID
) -> Invitation:
    """Return an invitation to the fleet of this host. `address`: that of the broker for other hosts, instead of the one
    in the settings; `account`: what they get instead of the account of this host, as USER:PASSWORD, not escaped;
    `valid`: seconds for which it can be used, if the broker keeps it.

    Raises:
        ConfigurationError: other hosts cannot reach the broker.
        BrokerUnavailable: it does not answer.
    """
    url = _reachable(settings, address)
    ca = settings.broker_ca.read_text("utf-8") if settings.broker_ca else None
    membership = Membership(
        role=role,
        broker_url=with_account(url, _escaped(account)) if account else url,
        broker_ca=ca,
        max_body_bytes=settings.max_body_bytes,
        affinity=settings.router.affinity,
        affinity_secret=_affinity_secret(settings) if role == "router" else None,
    )
    other = lan_address() if url != settings.broker_url and not _is_address(urlsplit(url).hostname) else None
    common = {"broker_url": with_account(url, ""), "other_address": other, "broker_ca": ca}
    if deposited := deposit(settings, membership, valid):
        return Invitation(id=deposited[0], secret=deposited[1], **common)
    return Invitation(membership=membership, **common)


def _escaped(account: str) -> str:
    user, _, password = account.partition(":")
    return f"{quote(user, safe='')}:{quote(password, safe='')}"


def _reachable(settings: Settings, address: str) -> str:
    """Return broker_url as other hosts need it."""
    url = settings.broker_url
    try:
        address = address and host_name(address.strip("[]"))
    except ValueError as error:
        raise ConfigurationError(f"--address: {error}") from None
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


def join_line(invitation: Invitation, role: Role = "mini") -> str:
    """Return the command line that the other host needs."""
    return f"fleet-worker join {invitation.encode()}{' --up' if role == 'mini' else ''}"


def validity(invitation: Invitation) -> str:
    """Return how long an invitation is valid, in words."""
    if invitation.membership:
        return "(this line holds the account of the broker, and stays valid: keep it to yourself)"
    return f"(once, within {VALID / 60:.0f} minutes; another line: fleet-worker invite)"
