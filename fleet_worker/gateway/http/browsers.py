"""A gateway without keys serves the programs of its own machine, and no pages in a browser there.

A page can send requests to 127.0.0.1: then the browser tells where the page is from, in `Origin`. A page's own name can
also get that address after it was loaded (DNS rebinding): then that name is in `Host`. Names that nobody can buy are
taken for those of this machine.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from fleet_worker.gateway.problems import refuse

_OF_THIS_MACHINE = ("localhost", "internal", "local")
"""Last parts of names: Docker calls its host `host.docker.internal`, and mDNS calls machines `mini-1.local`."""


def refuse_foreign_pages(headers: Mapping[str, str]) -> None:
    """Raise `Refused` if a page of another machine asks."""
    host, origin = headers.get("host"), headers.get("origin")
    if host and not _is_of_this_machine(f"//{host}"):
        text = "host: without keys this gateway serves its own machine only: ask it as localhost, or set gateway.keys"
        raise refuse(403, "not_allowed", text)
    if origin and (origin == "null" or (origin.lower().startswith("http") and not _is_of_this_machine(origin))):
        raise refuse(403, "not_allowed", "origin: without keys this gateway serves no pages: set gateway.keys")


def _is_of_this_machine(url: str) -> bool:
    try:
        name = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return False
    return name.rpartition(".")[2] in _OF_THIS_MACHINE or name == socket.gethostname().lower() or _is_address(name)


@lru_cache(100)  # it is asked for each request, nearly always about the same name
def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
