"""`fleet-worker join`: makes this host a part of the fleet that has invited it."""

from __future__ import annotations

import socket
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import tomlkit

from fleet_worker.broker.app import create_app
from fleet_worker.broker.faults import unavailable
from fleet_worker.errors import BrokerUnavailable, ConfigurationError
from fleet_worker.host.file_lock import holder
from fleet_worker.host.up_socket import lock_path
from fleet_worker.ops.broker_checks import connected
from fleet_worker.settings import REGISTRY
from fleet_worker.setup import worker_file
from fleet_worker.setup.invitation import Invitation, Membership, decode
from fleet_worker.setup.own_names import own_host
from fleet_worker.setup.single_use import redeem
from fleet_worker.setup.worker_file import ExplicitSettings, WorkerFile
from fleet_worker.urls import with_host

CONNECTS_WITHIN = 3.0
"""Seconds for a connection to one address of the broker."""
ANSWERS_WITHIN = 1.0
"""Seconds for another host of the same name to answer."""
MOST_OF_ONE_NAME = 20
CA_FILE = "broker-ca.pem"
_PORTS = {"redis": 6379, "rediss": 6379, "amqp": 5672, "amqps": 5671}


def join(line: str, path: Path, known: WorkerFile, *, force: bool = False) -> tuple[Membership, str]:
    """Use an invitation, and write what it gives into the file at `path` at once, so that it cannot be lost. The file
    has no instances yet.

    `known` is what this host brings: a client certificate, and perhaps its name. Without one it gets its own, with a
    number if another host of the fleet has it. Returns the name besides.

    Raises:
        ConfigurationError: the line is no invitation, or not valid any more; or the file exists, or cannot be written.
        BrokerUnavailable: the broker cannot be reached. The invitation can still be used.
    """
    invitation = decode(line)
    _check_place(path, force=force)
    membership = _redeem(invitation, known)
    name = known.host or own_host()
    file = _written(membership, path, replace(known, host=name), force=force)
    if not known.host and (free := _free_name(file, name)) != name:
        worker_file.write(path, replace(file, host=free).text(), force=True)
        name = free
    return membership, name


def _redeem(invitation: Invitation, known: WorkerFile) -> Membership:
    """Return the membership, with the address of the broker that answers here."""
    host = _address_that_answers(invitation)
    at_host = invitation.model_copy(update={"broker_url": with_host(invitation.broker_url, host)})
    membership = redeem(at_host, known.broker_cert, known.broker_key)
    if host != invitation.other_address:
        return membership
    return membership.model_copy(update={"broker_url": with_host(membership.broker_url, host)})


def _check_place(path: Path, *, force: bool) -> None:
    """Raise `ConfigurationError` if the file cannot be written later: the invitation is used up by then."""
    worker_file.check_free(path, force=force)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None


def _address_that_answers(invitation: Invitation) -> str:
    """Return the name of the broker, or its other address if only that answers here."""
    url = urlsplit(invitation.broker_url)
    name = url.hostname or "localhost"
    port = url.port or _PORTS.get(url.scheme, 5672)
    failed: OSError | None = None
    for host in filter(None, (name, invitation.other_address)):
        try:
            socket.create_connection((host, port), CONNECTS_WITHIN).close()
        except OSError as error:
            failed = failed or error
        else:
            return host
    found = unavailable(invitation.broker_url, "cannot be reached", failed or OSError())
    advice = "start it there, or see to it that this host reaches it; the invitation is not used up"
    raise BrokerUnavailable(found.message, advice=advice)


def _written(membership: Membership, path: Path, known: WorkerFile, *, force: bool) -> WorkerFile:
    ca = path.with_name(CA_FILE) if membership.broker_ca else None
    if ca and membership.broker_ca:
        worker_file.write(ca, membership.broker_ca, force=True)
    file = replace(
        known,
        broker_url=membership.broker_url,
        broker_ca=ca,
        max_body_bytes=membership.max_body_bytes,
        more=_for_routers(membership),
        made_by="fleet-worker join",
    )
    worker_file.write(path, file.text(), force=force)
    return file


def _free_name(file: WorkerFile, name: str) -> str:
    """Return the name, or the first of NAME-2, NAME-3 ... that no other host has whose registry node answers."""
    settings = ExplicitSettings(
        broker_url=file.broker_url,
        broker_ca=file.broker_ca,
        broker_cert=file.broker_cert,
        broker_key=file.broker_key,
    )
    if holder(lock_path(settings.state_dir, name)):
        return name  # that other host is this one
    app = create_app(settings)
    names = (name, *(f"{name}-{number}" for number in range(2, MOST_OF_ONE_NAME)))
    with suppress(BrokerUnavailable), connected(settings) as connection:
        for each in names:
            node = f"{REGISTRY}@{each}"
            if not app.control.ping([node], ANSWERS_WITHIN, connection=connection, limit=1):
                return each
    return name


def _for_routers(membership: Membership) -> str:
    if membership.role == "mini":
        return ""
    router: dict[str, object] = {} if membership.affinity else {"affinity": False}
    if membership.affinity_secret:
        router["affinity_secret"] = membership.affinity_secret
    return tomlkit.dumps({"router": router}) if router else ""
