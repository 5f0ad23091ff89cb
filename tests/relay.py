"""A network between a broker and its clients that can be cut without anybody being told."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from tests.brokers import RabbitMQ, Valkey


class Relay:
    """`url` leads to the broker. What was connected when the network is cut stays silent for ever; what connects while
    it is cut gets no answer until it is mended.
    """

    def __init__(self, broker: Valkey | RabbitMQ) -> None:
        parts = urlsplit(broker.url)
        self._broker = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        user = f"{parts.username}:{parts.password}@" if parts.username else ""
        self.url = urlunsplit(parts._replace(netloc=f"{user}127.0.0.1:{self._listener.getsockname()[1]}"))
        self._whole = threading.Event()
        self._whole.set()
        self._sockets: list[socket.socket] = [self._listener]
        self._closed = False
        self._cuts = 0
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._whole.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def cut(self) -> None:
        self._whole.clear()
        self._cuts += 1

    def mend(self) -> None:
        self._whole.set()

    def _accept(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError):
                client = self._listener.accept()[0]
                self._sockets.append(client)
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        self._whole.wait()
        if self._closed:
            return
        cuts, broker = self._cuts, socket.create_connection(self._broker)
        self._sockets.append(broker)
        with contextlib.suppress(OSError):
            while ready := select.select([client, broker], [], [])[0]:
                for each in ready:
                    data = each.recv(65536)
                    if self._cuts != cuts:
                        return  # and both stay open
                    if not data:
                        client.shutdown(socket.SHUT_RDWR)
                        broker.shutdown(socket.SHUT_RDWR)
                        return
                    (broker if each is client else client).sendall(data)
