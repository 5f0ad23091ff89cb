"""HTTP connections to an MLX server: a new one for each request, which its guard can cut from the first packet on."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from pathlib import Path
from typing import Any

import httpx

from fleet_worker.certificates import TLS
from fleet_worker.mlx.http_response import ResponseReader
from fleet_worker.mlx.timeouts import ConnectionGuard
from fleet_worker.version import VERSION

HEADERS = {
    "accept": "*/*",
    "accept-encoding": "identity",
    "connection": "close",
    "user-agent": f"fleet-worker/{VERSION}",
}
"""Of every request."""


class Transport(httpx.BaseTransport):
    """Opens a connection for each request; it ends with the response. A request has its `ConnectionGuard` in
    `extensions["guard"]`, and the seconds that connecting may take in `extensions["timeout"]["connect"]`.

    httpx's own transport does not tell the socket of a request before the response arrives. It keeps connections in a
    pool: the server may close one just when the next request is sent, which then looks as if the server had died. And
    it takes several times as long for each chunk of a body, and for each request.
    """

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._tls = tls

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        connection = self._connect(request)
        try:
            _send(connection, _encode(request))
            return ResponseReader(connection).read_headers()
        except BaseException:
            connection.close()
            raise

    def _connect(self, request: httpx.Request) -> socket.socket:
        url, guard, timeout = request.url, request.extensions["guard"], request.extensions["timeout"]["connect"]
        try:
            connection = _first_connection(url, guard, timeout)
            return _secured(connection, self._tls, url.host, timeout) if self._tls else connection
        except OSError as error:  # also: no such host
            raise httpx.ConnectError(str(error)) from error


def url_of(base_url: httpx.URL, path: str) -> httpx.URL:
    """Return the URL of a path below this one."""
    return base_url.copy_with(raw_path=base_url.raw_path.rstrip(b"/") + path.encode())


def tls_context(url: httpx.URL, ca: Path | None) -> ssl.SSLContext | None:
    """Return the context that verifies chain and host name of an https server: against this CA, or else against those
    that browsers trust. Loading them takes longer than everything else here."""
    if url.scheme != "https":
        return None
    return TLS(ca).context() if ca else httpx.create_ssl_context(trust_env=False)


def _first_connection(url: httpx.URL, guard: ConnectionGuard, timeout: float | None) -> socket.socket:
    """Connect to the first address of the host that accepts; each address has the whole timeout."""
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    failure = OSError("the host has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM):
        try:
            return _connected(socket.socket(family, kind, protocol), address, guard, timeout)
        except OSError as error:
            failure = error
    raise failure


def _connected(connection: socket.socket, address: Any, guard: ConnectionGuard, timeout: float | None) -> socket.socket:
    """Connect this socket, from now on guarded; close it if that fails with an `OSError`."""
    try:
        if guard.was_cut.is_set():
            raise ConnectionAbortedError
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BlockingIOError):
            connection.connect(address)
        guard.attach(connection)  # not earlier: a socket that is not connecting yet cannot be cut
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


def _secured(connection: socket.socket, tls: ssl.SSLContext, host: str, timeout: float | None) -> ssl.SSLSocket:
    """Return the connection with TLS; close it if that fails. Only the handshake has a timeout: the guard limits all
    else."""
    try:
        connection.settimeout(timeout)
        secured = tls.wrap_socket(connection, server_hostname=host)
        secured.settimeout(None)
    except OSError:
        connection.close()
        raise
    return secured


def _encode(request: httpx.Request) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    return b"\r\n".join([*lines, b"", request.read()])


def _send(connection: socket.socket, request: bytes) -> None:
    try:
        connection.sendall(request)
    except OSError as error:
        raise httpx.WriteError(str(error)) from error
