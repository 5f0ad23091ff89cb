"""The Unix socket of `fleet-worker up`, its own end: one thread reads what all clients send, and waits for none."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from fleet_worker.host import state_socket
from fleet_worker.host.up_socket import LineBuffer
from fleet_worker.protocol.host_messages import (
    LONGEST_LINE,
    MOST_SERVERS,
    TO_UP,
    Done,
    FromUp,
    HostStatus,
    ToUp,
    to_line,
)
from fleet_worker.protocol.status import SHOWN

log = logging.getLogger(__name__)

MOST_CLIENTS = 128
MOST_UNSENT = 4 * LONGEST_LINE
"""Bytes that may wait for a client that does not read. Beyond it the client is disconnected."""
OWN = frozenset(each.default for kind in get_args(FromUp) for each in fields(kind) if each.name == "kind")
"""The kinds of what `up` sends: nobody sends them to it."""
SHORT = 190
"""Characters of a reason, of four bytes each, with which a line has room for MOST_SERVERS."""
READ_AT_ONCE = 16
"""Connections that are accepted in one go, so that nobody can keep `up` from its other work."""


class Client:
    """One connection. Not usable by two threads."""

    def __init__(self, connection: socket.socket, server: UpServer) -> None:
        connection.setblocking(False)
        self.connected = True
        self.is_silent = True
        """It has said nothing yet."""
        self._socket = connection
        self._server = server
        self._lines = LineBuffer()
        self._unsent = b""

    def send(self, message: FromUp) -> None:
        """Send it, or what fits now and the rest later. A client that has disconnected gets nothing."""
        if self.connected:
            self._unsent += _line(message)
            self._flush()

    def serve(self, events: int) -> None:
        """Read and write what can be without waiting."""
        if self.connected and events & selectors.EVENT_WRITE:
            self._flush()
        if self.connected and events & selectors.EVENT_READ:
            self._read()

    def disconnect(self) -> None:
        if self.connected:
            self.connected = False
            self._server.forget(self, self._socket)
            self._socket.close()

    def _flush(self) -> None:
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :] if self._unsent else b""
        except BlockingIOError:
            pass
        except OSError:
            self.disconnect()
            return
        if len(self._unsent) > MOST_UNSENT:
            log.warning("a process that does not read what fleet-worker up sends is disconnected")
            self.disconnect()
            return
        self._server.watch(self, self._socket, writes=bool(self._unsent))

    def _read(self) -> None:
        try:
            if not (data := self._socket.recv(65536)):
                raise ConnectionResetError
            messages = [_read(line) for line in self._lines.feed(data)]
        except BlockingIOError:
            return
        except OSError:
            self.disconnect()
            return
        except ValueError:  # ValidationError is one
            log.warning("a process sent fleet-worker up what is no message, and is disconnected")
            self.disconnect()
            return
        self.is_silent = self.is_silent and not messages
        for message, _ in groupby(messages):  # the same one again and again counts once
            if message:
                self._server.received(self, message)
            else:
                self.send(Done("this fleet-worker up is of another version and does not know that: restart it"))


class UpServer:
    """Calls `received` with each message, and `gone` with each client that has disconnected.

    The owner calls `key.data(events)` for what its selector has found ready.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        received: Callable[[Client, ToUp], None],
        gone: Callable[[Client], None],
    ) -> None:
        self.received = received
        self._selector = selector
        self._gone = gone
        self._clients: dict[Client, None] = {}  # the oldest first
        self._path: Path | None = None
        self._socket: socket.socket | None = None

    def listen(self, path: Path) -> None:
        """Listen here, and nowhere else any more; who is connected stays so. An earlier socket at the path is removed:
        the owner holds the lock of `up`, so nobody listens there.

        Raises:
            ConfigurationError: the socket cannot be created.
        """
        new = state_socket.listen(path, make_free=_remove, backlog=MOST_CLIENTS)
        new.setblocking(False)
        self._stop_listening()
        self._path, self._socket = path, new
        self._selector.register(new, selectors.EVENT_READ, lambda _events: self._accept(new))

    def close(self) -> None:
        self._stop_listening()
        for client in list(self._clients):
            client.disconnect()

    def _stop_listening(self) -> None:
        if self._socket and self._path:
            with contextlib.suppress(OSError):  # it is gone, or nothing can be written any more
                self._path.unlink()
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def watch(self, client: Client, connection: socket.socket, *, writes: bool) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writes else 0)
        if self._selector.get_key(connection).events != events:
            self._selector.modify(connection, events, client.serve)

    def forget(self, client: Client, connection: socket.socket) -> None:
        self._clients.pop(client, None)
        self._selector.unregister(connection)
        self._gone(client)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(READ_AT_ONCE):
            try:
                connection, _ = listening.accept()
            except BlockingIOError:
                return
            except OSError:  # too many open files; or the client has disconnected already, on macOS
                time.sleep(0.05)  # it is tried again at once, as the client still waits
                return
            if len(self._clients) >= MOST_CLIENTS and (silent := next((c for c in self._clients if c.is_silent), None)):
                silent.disconnect()
            if len(self._clients) >= MOST_CLIENTS:
                log.warning("more than %d processes are connected to fleet-worker up: one is refused", MOST_CLIENTS)
                connection.close()
                continue
            client = Client(connection, self)
            self._clients[client] = None
            self._selector.register(connection, selectors.EVENT_READ, client.serve)


def _line(message: FromUp) -> bytes:
    """Return its line, with texts that are short enough for its reader; shorter ones if it would still be too long."""
    match message:
        case Done():
            return to_line(replace(message, error=message.error[:SHOWN], text=message.text[:SHOWN]))
        case HostStatus():
            line = to_line(_shortened(message, SHOWN))
            fits = len(line) <= LONGEST_LINE
            return line if fits else to_line(_shortened(message, SHORT))
    return to_line(message)


def _shortened(status: HostStatus, most: int) -> HostStatus:
    servers = status.servers[:MOST_SERVERS]
    return replace(status, servers=tuple(replace(each, reason=each.reason[:most]) for each in servers))


def _read(line: bytes) -> ToUp | None:
    """Return the message of a line; None for one of a kind that only another version knows. Raises `ValueError`."""
    try:
        return TO_UP.validate_json(line)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        if fault["type"] == "union_tag_invalid" and fault["ctx"]["tag"] not in OWN:
            return None
        raise


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
