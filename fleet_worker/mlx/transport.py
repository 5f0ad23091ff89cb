"""HTTP connections to an MLX server: a new one for each request, which its guard can cut from the first packet on."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpcore
import httpx

from fleet_worker.certificates import TLS
from fleet_worker.mlx.timeouts import ConnectionGuard


class Transport(httpx.HTTPTransport):
    """httpx's transport without a connection pool. A request has its `ConnectionGuard` in `extensions["guard"]`.

    The socket of a pooled connection is not known before the response arrives. And the server may close such a
    connection just when the next request is sent, which then looks as if the server had died.
    """

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._pool = _NoPool(tls)


def tls_context(url: httpx.URL, ca: Path | None) -> ssl.SSLContext | None:
    """Return the context that verifies chain and host name of an https server: against this CA, or else against those
    that browsers trust. Loading them takes longer than everything else here."""
    if url.scheme != "https":
        return None
    return TLS(ca).context() if ca else httpx.create_ssl_context(trust_env=False)


class _NoPool(httpcore.ConnectionPool):
    """Opens a connection for each request; it ends with the response."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        super().__init__()
        self._tls = tls

    def handle_request(self, request: httpcore.Request) -> httpcore.Response:
        backend = _GuardedBackend(request.extensions["guard"])
        return httpcore.HTTPConnection(request.url.origin, self._tls, network_backend=backend).handle_request(request)


class _GuardedBackend(httpcore.NetworkBackend):
    """Attaches each socket to the guard before it is connected."""

    def __init__(self, guard: ConnectionGuard) -> None:
        self._guard = guard

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of the host that accepts; each address has the whole timeout."""
        failure: OSError | None = None
        try:
            for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                try:
                    return _Stream(self._connected(socket.socket(family, kind, protocol), address, timeout))
                except OSError as error:
                    failure = error
        except OSError as error:  # no such host
            failure = error
        raise httpcore.ConnectError(str(failure))

    def _connected(self, connection: socket.socket, address: Any, timeout: float | None) -> socket.socket:
        try:
            if self._guard.was_cut.is_set():
                raise ConnectionAbortedError
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BlockingIOError):
                connection.connect(address)
            self._guard.attach(connection)  # not earlier: a socket that is not connecting yet cannot be cut
            poll = select.poll()
            poll.register(connection, select.POLLOUT)
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise TimeoutError
            if failure := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(failure, "not connected")
            connection.setblocking(True)
        except OSError:
            connection.close()
            raise
        return connection


class _Stream(httpcore.NetworkStream):
    """A socket as httpcore needs it. Only the TLS handshake has a timeout; the guard limits everything else."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return self._connection.recv(max_bytes)
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            self._connection.sendall(buffer)
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            self._connection.settimeout(timeout)
            secured = ssl_context.wrap_socket(self._connection, server_hostname=server_hostname)
            secured.settimeout(None)
        except OSError as error:
            self._connection.close()
            raise httpcore.ConnectError(str(error)) from error
        return _Stream(secured)

    def close(self) -> None:
        self._connection.close()
