"""Connections to RabbitMQ on which no read is without an end, and with our TLS."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

from amqp.transport import SSLTransport, TCPTransport
from kombu.transport import pyamqp

from fleet_worker.broker.tls import refusal_explained
from fleet_worker.certificates import TLS

_read_plain, _read_secure = TCPTransport._read, SSLTransport._read  # called nine times for each message


READ_AHEAD = 16 * 1024
"""Bytes: a copy of what is left of them is made for each of the nine parts of a message."""


class _ReadsAhead:
    """Reads what has arrived at once, if it is asked to. Nobody may then wait for the socket itself."""

    _quick_recv: Callable[[int], bytes]
    _read_buffer: bytes

    def read_ahead(self) -> None:
        recv = self._quick_recv
        self._quick_recv = lambda size: recv(max(size, READ_AHEAD))

    @property
    def has_more(self) -> bool:
        """Return whether the beginning of another frame has been read."""
        return bool(self._read_buffer)


class Socket(_ReadsAhead, TCPTransport):  # type: ignore[misc]
    def _read(self, n: int, initial: bool = False) -> Any:
        """Give up if the rest of a frame has not arrived when an event loop reads; it goes on when that has.

        py-amqp tries again without a pause and without an end: a network that is cut in the middle of a frame would
        stop a node for as long, heartbeats included.
        """
        return _read_plain(self, n, True)


class SecureSocket(_ReadsAhead, SSLTransport):  # type: ignore[misc]
    """With our context, too: py-amqp's own asks on the terminal for the passphrase of a key."""

    def _read(self, n: int, initial: bool = False) -> Any:
        return _read_secure(self, n, True)

    def _shutdown_transport(self) -> None:
        """Do not end TLS in order: that would wait for an answer, and the broker may be frozen."""

    def _wrap_socket(self, sock: Any, **options: Any) -> ssl.SSLSocket:
        context, name = _tls_of(options).context(), options.get("server_hostname")
        return context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=name)  # it makes it afterwards


class Connection(pyamqp.Connection):  # type: ignore[misc]
    def connect(self, *args: Any) -> None:
        tls, name = (_tls_of(self.ssl), self.ssl.get("server_hostname")) if self.ssl else (None, None)
        with refusal_explained(tls, self.host, name):
            self._or_collect(super().connect, *args)

    def close(self, *args: Any, **options: Any) -> None:
        self._or_collect(super().close, *args, **options)

    def _or_collect(self, method: Callable[..., object], *args: Any, **options: Any) -> None:
        """Close the socket if this fails: py-amqp does so for some errors only, and kombu ignores others."""
        try:
            method(*args, **options)
        except BaseException:
            self.collect()
            raise

    def Transport(  # noqa: N802
        self, host: str, connect_timeout: float | None, ssl: Any, read_timeout: Any, write_timeout: Any, **options: Any
    ) -> Any:
        limits = {"connect_timeout": connect_timeout, "read_timeout": read_timeout, "write_timeout": write_timeout}
        return (SecureSocket if ssl else Socket)(host, ssl=ssl, **limits, **options)


def _tls_of(options: dict[str, Any]) -> TLS:
    """Return what the options stand for that `tls.ssl_options` has made."""
    checks_chain, checks_host = options["cert_reqs"] != ssl.CERT_NONE, "server_hostname" in options
    return TLS(options["ca_certs"], options["certfile"], options["keyfile"], checks_chain, checks_host)
