"""TLS with kombu's two transports: one way to make the context, and one to read what a handshake has verified.

Celery and Flower get standard options (`broker_use_ssl`), so that whatever connects with them verifies, too.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from kombu import Connection
from redis import SSLConnection

from fleet_worker.certificates import TLS, chain
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

ALERT_WITHIN = 1.0
"""Seconds in which a broker that refuses a client certificate has to say so."""


def ssl_options(settings: Settings) -> dict[str, Any] | None:
    """Return Celery's `broker_use_ssl`: the options of redis-py or of py-amqp. None without TLS."""
    if not (tls := settings.broker_tls):
        return None
    ca, cert, key = (str(path) if path else None for path in (tls.ca, tls.cert, tls.key))
    needs = ssl.CERT_REQUIRED if tls.checks_chain else ssl.CERT_NONE
    url = urlsplit(settings.broker_url)
    if url.scheme == "rediss":
        files = {"ssl_ca_certs": ca, "ssl_certfile": cert, "ssl_keyfile": key}
        return {**files, "ssl_cert_reqs": needs, "ssl_check_hostname": tls.authenticates}
    # py-amqp checks the host name if it is told one; for None, kombu would fill in that of the URL.
    host = {"server_hostname": url.hostname or "localhost"} if tls.authenticates else {}
    return {"ca_certs": ca, "certfile": cert, "keyfile": key, "cert_reqs": needs, **host}


class RedisConnection(SSLConnection):
    """redis-py's, with our context. Its own trusts the CAs of the system besides the one that was set."""

    fleet_socket: ssl.SSLSocket | None = None
    """The one that it used last."""

    def connect(self) -> None:
        with refusal_explained(self._tls, f"{self.host}:{self.port}", self.host):
            super().connect()  # type: ignore[no-untyped-call]

    def _wrap_socket_with_ssl(self, sock: Any) -> ssl.SSLSocket:
        self.fleet_socket = secured = self._tls.context().wrap_socket(sock, server_hostname=self.host)
        return secured

    @property
    def _tls(self) -> TLS:
        checks_chain = self.cert_reqs != ssl.CERT_NONE
        return TLS(self.ca_certs, self.certfile, self.keyfile, checks_chain, bool(self.check_hostname))


@contextmanager
def refusal_explained(tls: TLS | None, place: str, name: str | None) -> Iterator[None]:
    """Raise the alert that tells why a broker refuses this client, instead of an error that only says that it did.
    `place` is HOST:PORT, `name` the one that its certificate must have.

    In TLS 1.3 the handshake has succeeded here before the broker looks at the certificate of a client. Its alert is
    lost if the first bytes of the protocol are sent at that moment.
    """
    try:
        yield
    except Exception as error:
        lost = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)
        if tls and any(isinstance(each, lost) for each in chain(error)):
            _listen_for_alert(tls, place, name)
        raise


def _listen_for_alert(tls: TLS, place: str, name: str | None) -> None:
    """Make the handshake once more, and send nothing. Raises `ssl.SSLError` if an alert comes."""
    host, _, port = place.rpartition(":")
    plain = socket.create_connection((host.strip("[]"), int(port)), ALERT_WITHIN)
    with contextlib.suppress(TimeoutError), plain, tls.context().wrap_socket(plain, server_hostname=name) as secured:
        secured.recv(1)


def socket_of(connection: Connection) -> Any:
    """Return the `ssl.SSLSocket` of an open connection."""
    if connection.transport.driver_type != "redis":
        return connection.connection.sock
    pool = connection.default_channel.pool
    pooled = pool.get_connection()
    pool.release(pooled)
    return pooled.fleet_socket


@functools.cache
def warn_once(place: str) -> None:
    """Log that the broker at this place is not authenticated: once in a process, whatever connects there."""
    log.warning(
        "the broker at %s is not authenticated: ssl_cert_reqs or ssl_check_hostname in broker_url turns that off, and "
        "anybody on the network may pose as the broker",
        place,
    )
