"""Connections to an MLX server: one for each request, so that its guard can cut it from the first packet on."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

from fleet_worker.mlx.timeouts import ConnectionGuard


class Transport(httpx.HTTPTransport):
    """httpx's own without its pool. A request carries its `ConnectionGuard` as `extensions["guard"]`.

    The socket of a pooled connection is not known before the response is there, and the server may be closing it at
    the moment of the next request, which then looks like a server that died.
    """

    def __init__(self, *, secure: bool) -> None:
        # Loading certificates takes longer than all the rest.
        self._pool = _Connections(httpx.create_ssl_context(trust_env=False) if secure else None)


class _Connections(httpcore.ConnectionPool):
    """Keeps none: a connection ends with its response."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        super().__init__()
        self._tls = tls

    def handle_request(self, request: httpcore.Request) -> httpcore.Response:
        backend = _Guarded(request.extensions["guard"])
        return httpcore.HTTPConnection(request.url.origin, self._tls, network_backend=backend).handle_request(request)


class _Guarded(httpcore.NetworkBackend):
    """Connects where a guard sees it."""

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
        """Connect to the first address of the host that accepts, each within the timeout."""
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
            if self._guard.over.is_set():
                raise ConnectionAbortedError
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BlockingIOError):
                connection.connect(address)
            self._guard.watch(connection)  # not before: what does not connect yet cannot be cut
            waiting = select.poll()
            waiting.register(connection, select.POLLOUT)
            if not waiting.poll(None if timeout is None else timeout * 1000):
                raise TimeoutError
            if failure := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(failure, "not connected")
            connection.setblocking(True)
        except OSError:
            connection.close()
            raise
        return connection


class _Stream(httpcore.NetworkStream):
    """A connection as httpcore takes it. Only a TLS handshake has a timeout: for the rest there is the guard."""

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
