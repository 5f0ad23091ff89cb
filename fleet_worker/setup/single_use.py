"""Both ends of an invitation on Valkey or Redis: an account of single use, which may take two keys and nothing else.

The key holds the `Membership`, which only the secret makes readable, and expires. A second key is there until the
invitation is used, or for a day, so that the account can ask why the first is gone. Accounts whose key is gone are
removed when the next one is made. They are in the memory of the broker only: a restart ends all invitations.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pydantic import ValidationError
from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from redis.retry import Retry

from fleet_worker.broker.faults import BROKER_ERRORS, unavailable
from fleet_worker.broker.tls import RedisConnection, ssl_options
from fleet_worker.broker.topology import transport_of
from fleet_worker.errors import ConfigurationError
from fleet_worker.ops.broker_checks import connected
from fleet_worker.settings import Settings
from fleet_worker.setup.invitation import ANOTHER, Invitation, Membership
from fleet_worker.setup.worker_file import ExplicitSettings
from fleet_worker.urls import with_account

VALID = 600.0
"""Seconds for which an invitation can be used."""
REMEMBERED = 86_400.0
"""Seconds for which the broker knows that an invitation has run out without being used."""
ANSWER_WITHIN = 5.0
_NAME = "fleet-invitation:"
"""Begins the name of the account, and that of the key. Without `llm.`: accounts of minis may read all such keys."""
_UNUSED = ":unused"
"""Ends the name of the key that stays until the invitation is used."""
_USED = "the invitation was used already"
_RUN_OUT = "the invitation has run out before it was used"
_UNKNOWN = "the broker does not know the invitation any more: it was used or has run out, or the broker was restarted"


def deposit(settings: Settings, membership: Membership, valid: float = VALID) -> tuple[str, str] | None:
    """Let the broker keep the membership for so many seconds; return the id and the secret for which it gives it away,
    once.

    None if this broker or this account cannot do that.

    Raises:
        BrokerUnavailable: the broker cannot be reached.
    """
    if transport_of(settings.broker_url) != "redis":
        return None
    id_, secret = secrets.token_hex(8), secrets.token_hex(16)
    name = _NAME + id_
    hashed = hashlib.sha256(secret.encode()).hexdigest()
    rules = ("reset", "on", f"#{hashed}", f"~{name}", f"~{name}{_UNUSED}", "+getdel", "+exists")
    with connected(settings) as connection:
        client = connection.default_channel.client
        text = membership.model_dump_json(exclude_defaults=True).encode()
        try:
            _remove_leftovers(client)
            # The keys come first: another `invite` removes accounts without one.
            client.set(name + _UNUSED, 1, px=round((valid + REMEMBERED) * 1000))
            client.set(name, _padded(text, secret), px=round(valid * 1000))
            client.execute_command("ACL", "SETUSER", name, *rules)
        except ResponseError:  # this user may not, a provider has disabled it, or it is older than Redis 6
            return None  # the key expires
    return id_, secret


def redeem(invitation: Invitation, cert: Path | None = None, key: Path | None = None) -> Membership:
    """Return the membership that the broker keeps for this invitation, which is used up then. `cert` and `key`: PEM
    files, if the broker asks for a client certificate.

    Raises:
        ConfigurationError: the invitation was used or has run out, or the broker does not know it.
        BrokerUnavailable: the broker cannot be reached. The invitation can still be used.
    """
    if invitation.membership:
        return invitation.membership
    name = _NAME + invitation.id
    url = with_account(invitation.broker_url, f"{quote(name, safe='')}:{invitation.secret}")
    with _ca_file(invitation.broker_ca) as ca:
        settings = ExplicitSettings(broker_url=url, broker_ca=ca, broker_cert=cert, broker_key=key)
        with _client(settings) as client:
            kept = _take(client, name, invitation.broker_url)
    try:
        return Membership.model_validate_json(_padded(kept, invitation.secret))
    except ValidationError:
        text = "the host of the router has another version of fleet-worker: install the same on both hosts"
        raise ConfigurationError(text) from None


def _padded(text: bytes, secret: str) -> bytes:
    """Hide or show a text by a pad that is used for this one only: the file of a broker keeps what has expired, too."""
    pad = hashlib.shake_256(f"membership {secret}".encode()).digest(len(text))
    return bytes(one ^ other for one, other in zip(text, pad, strict=True))


def _take(client: Redis, name: str, broker_url: str) -> bytes:
    """Return what the key holds, and remove it; raises `ConfigurationError` if the broker does not know the account, or
    the key is gone."""
    try:
        kept: Any = client.getdel(name)
        if kept:
            with suppress(*BROKER_ERRORS):
                client.getdel(name + _UNUSED)
            return bytes(kept)
        why = _RUN_OUT if client.exists(name + _UNUSED) else _USED
    except (AuthenticationError, NoPermissionError):
        why = _UNKNOWN
    except BROKER_ERRORS as error:
        raise unavailable(broker_url, "cannot be used", error) from None
    raise ConfigurationError(f"{why}; {ANOTHER}")


def _client(settings: Settings) -> Redis:
    """Return a client that asks once, since what it asks for is given away once."""
    url = urlsplit(settings.broker_url)
    options: dict[str, Any] = {"username": unquote(url.username or ""), "password": url.password}
    options |= {"socket_timeout": ANSWER_WITHIN, "socket_connect_timeout": ANSWER_WITHIN}
    options |= {"protocol": 2, "retry": Retry(NoBackoff(), 0)}
    if tls := ssl_options(settings):
        options |= {"connection_class": RedisConnection, **tls}
    return Redis(connection_pool=ConnectionPool(host=url.hostname or "localhost", port=url.port or 6379, **options))


@contextmanager
def _ca_file(pem: str | None) -> Iterator[Path | None]:
    if not pem:
        yield None
        return
    with NamedTemporaryFile("w", suffix=".pem", encoding="utf-8") as file:
        file.write(pem)
        file.flush()
        yield Path(file.name)


def _remove_leftovers(client: Any) -> None:
    """Remove the accounts whose key was taken or has expired."""
    accounts = [
        each.decode() if isinstance(each, bytes) else str(each) for each in client.execute_command("ACL", "USERS")
    ]
    left = [name for name in accounts if name.startswith(_NAME) and not client.exists(name)]
    if left:
        client.execute_command("ACL", "DELUSER", *left)
