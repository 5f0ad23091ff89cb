"""Certificates that tests make, and a proxy that speaks TLS in front of a server that does not: the embedded Valkey is
built without it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import trustme

LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)


class Pair(NamedTuple):
    cert: Path
    key: Path


class Certificates:
    """Files of two CAs in a folder, and of certificates that these have issued. Nobody should trust the second one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authorities = {"ca": trustme.CA(), "other": trustme.CA()}
        for name, authority in self._authorities.items():
            authority.cert_pem.write_to_path(str(folder / f"{name}.pem"))
        self.ca, self.other_ca = folder / "ca.pem", folder / "other.pem"
        self.server = self.issue("server", "localhost")
        self.client = self.issue("client", "router@fleet.example")

    def issue(self, name: str, *hosts: str, by: str = "ca", **options: Any) -> Pair:
        """`name` is that of the files; `by` is "ca" or "other"; `options` are those of trustme."""
        issued = self._authorities[by].issue_cert(*hosts, **options)
        pair = Pair(self._folder / f"{name}.cert.pem", self._folder / f"{name}.key.pem")
        pair.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        pair.key.write_bytes(issued.private_key_pem.bytes())
        return pair


class Proxy:
    """Accepts TLS on a port of 127.0.0.1, and connects it to another port."""

    def __init__(self, certificates: Certificates, target: int, *, asks: bool = False) -> None:
        """`asks`: it accepts only clients with a certificate."""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.show(certificates.server)
        if asks:
            self._context.load_verify_locations(certificates.ca)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._target = target
        self.accepted = 0
        """The number of connections so far, whether their handshake succeeded or not."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:  # the listener is the first
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def show(self, pair: Pair) -> None:
        """Show this certificate to clients from now on."""
        self._context.load_cert_chain(*pair)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is shut down
            while True:
                client = self._listener.accept()[0]
                self.accepted += 1
                self._sockets.append(client)
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            secured = self._context.wrap_socket(client.dup(), server_side=True)
            with secured, socket.create_connection(("127.0.0.1", self._target)) as inner:
                _relay(secured, inner)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def _relay(secured: ssl.SSLSocket, inner: socket.socket) -> None:
    while True:
        for each in [secured] if secured.pending() else select.select([secured, inner], [], [])[0]:
            if not (data := each.recv(65536)):
                return
            (inner if each is secured else secured).sendall(data)
