"""Checks of TLS: what the handshake with the broker has verified, and until when its certificate is valid."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from typing import Any

from fleet_worker.broker.tls import socket_of
from fleet_worker.certificates import TLS
from fleet_worker.ops.findings import Finding
from fleet_worker.settings import Settings

RENEW_BEFORE = 14.0
"""Days; a certificate that expires earlier is a warning."""


def encryption(settings: Settings, connection: Any) -> Iterator[Finding]:
    """Tell what this open connection has verified; nothing if it uses no TLS."""
    if tls := settings.broker_tls:
        secured = socket_of(connection)
        yield handshake(tls, secured.version() or "TLS", secured.getpeercert() or {})


def handshake(tls: TLS, version: str, certificate: dict[str, Any], *, now: float | None = None) -> Finding:
    """Judge a handshake: `certificate` is that of the broker as `getpeercert` returns it, empty if it is not checked.
    `now` is epoch seconds."""
    client = "a client certificate is sent" if tls.cert else "no client certificate is sent"
    if not tls.authenticates:
        unchecked = "host name" if tls.checks_chain else "certificate"
        found = (
            f"{version}, but the broker's {unchecked} is not verified: anybody on the network may pose as the broker"
        )
        return Finding("warning", f"{found}; {client}", "leave out what turns that off in broker_url; set broker_ca")
    expires = ssl.cert_time_to_seconds(certificate["notAfter"])
    until = time.strftime("%Y-%m-%d", time.gmtime(expires))
    found = f"{version}: chain and host name are verified, the broker's certificate is valid until {until}; {client}"
    if expires - (time.time() if now is None else now) < RENEW_BEFORE * 24 * 3600:
        return Finding("warning", found, "renew it: after that day nothing connects any more")
    return Finding("ok", found)
