"""How the processes of a host talk to its `fleet-worker up`: lines of JSON over a Unix socket. This is their end of it.

The messages are in `protocol/host_messages`, the end of `up` in `up/up_server`. Without an `up` all else works as
usual.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from fleet_worker.host import state_socket
from fleet_worker.host.file_lock import holder
from fleet_worker.protocol.host_messages import (
    FROM_UP,
    LONGEST_LINE,
    Done,
    FromUp,
    NodeNews,
    Reload,
    Restart,
    Watch,
    to_line,
)
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

SEND_WITHIN = 2.0  # seconds
RECONNECT_AFTER = (0.1, 1.0)
"""Seconds between two tries to connect: the first pause, which doubles, and the longest."""


class NoUp(Exception):
    """No `fleet-worker up` runs on this host, or it gave no answer in time."""


def lock_path(state_dir: Path, host: str) -> Path:
    return state_dir / f"up-{host}.lock"


def socket_path(state_dir: Path, host: str) -> Path:
    """Return where the `up` of this host listens.

    Raises:
        ConfigurationError: the path is too long for a Unix socket.
    """
    return state_socket.path_of(state_dir, f"up-{host}")


def ask(settings: Settings, message: Restart | Reload, within: float) -> Done:
    """Send a message to the `up` of this host and return its answer.

    It may run under another name, if `host` is what has changed.

    Raises:
        NoUp: there is none, or it did not answer within so many seconds.
        ConfigurationError: `state_dir` is too long for a socket.
    """
    deadline = time.monotonic() + within
    buffer = LineBuffer()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(within)
            connection.connect(str(_running_at(settings)))
            connection.sendall(to_line(message))
            while True:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                if not (data := connection.recv(65536)):
                    raise NoUp("fleet-worker up ended before it had answered")
                for line in buffer.feed(data):
                    if isinstance(answer := FROM_UP.validate_json(line), Done):
                        return answer
    except TimeoutError:
        raise NoUp(f"fleet-worker up did not answer within {within:g} s") from None
    except (FileNotFoundError, ConnectionError):
        raise NoUp("no fleet-worker up runs on this host") from None
    except (OSError, ValueError) as error:  # ValidationError is a ValueError
        raise NoUp(f"fleet-worker up cannot be asked ({type(error).__name__})") from None


def _running_at(settings: Settings) -> Path:
    own = socket_path(settings.state_dir, settings.host)
    if holder(lock_path(settings.state_dir, settings.host)):
        return own
    others = [path for path in settings.state_dir.glob("up-*.lock") if holder(path)]
    return others[0].with_suffix(".sock") if len(others) == 1 else own


class LineBuffer:
    """Splits what arrives into lines; raises `ValueError` for one that is longer than LONGEST_LINE."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE or any(len(line) > LONGEST_LINE for line in lines):
            raise ValueError("a line is too long")
        return lines


class UpLink:
    """The end of a node, or of a watcher: one thread, which connects whenever an `up` is there.

    `received` is called with each order or status, and `lost` when the connection has ended, both on that thread: they
    must not wait. Each connection begins with the last message of `send`.
    """

    def __init__(
        self, path: Path, received: Callable[[FromUp], None], *, lost: Callable[[], None] = lambda: None
    ) -> None:
        self._path = path
        self._received = received
        self._lost = lost
        self._message: NodeNews | Watch | None = None
        self._closed = False
        self._wakeup, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="fleet-up-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, message: NodeNews | Watch) -> None:
        """Send it soon, or as soon as there is an `up`; a later message replaces it until then. Never waits."""
        self._message = message
        self._wake_up()

    def close(self) -> None:
        """Disconnect soon; only once."""
        self._closed = True
        self._wake_up()
        if self._thread.ident is None:  # it was never started
            self._wakeup.close()
            self._wake.close()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # it is full, so the thread wakes anyway; or closed
            self._wake.send(b"\0")

    def _run(self) -> None:
        pause, longest = RECONNECT_AFTER
        with self._wakeup, self._wake, selectors.DefaultSelector() as self._selector:
            self._selector.register(self._wakeup, selectors.EVENT_READ)
            while not self._closed:
                if self._connected():
                    pause = RECONNECT_AFTER[0]
                self._wait(pause)
                pause = min(longest, 2 * pause)

    def _connected(self) -> bool:
        """Talk to `up` until the connection ends; return False if there is none."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(SEND_WITHIN)
            try:
                connection.connect(str(self._path))
            except OSError:
                return False
            self._selector.register(connection, selectors.EVENT_READ)
            try:
                self._talk(connection)
            except (OSError, ValueError):  # it is stuck, or is no `up`
                pass
            finally:
                self._selector.unregister(connection)
            self._call(self._lost)
        return True

    def _talk(self, connection: socket.socket) -> None:
        buffer, sent = LineBuffer(), None
        while not self._closed:
            if (message := self._message) is not None and message is not sent:
                connection.sendall(to_line(message))
                sent = message
            if connection in self._wait(None):
                if not (data := connection.recv(65536)):
                    return
                for line in buffer.feed(data):
                    self._receive(line)

    def _wait(self, timeout: float | None) -> Sequence[object]:
        """Return the sockets that are ready; a message to send ends the wait too."""
        ready = [key.fileobj for key, _ in self._selector.select(timeout)]
        if self._wakeup in ready:
            self._wakeup.recv(4096)
        return ready

    def _receive(self, line: bytes) -> None:
        try:
            message = FROM_UP.validate_json(line)
        except ValidationError:  # an `up` of a newer version
            log.debug("a message of fleet-worker up is of no known kind")
        else:
            self._call(self._received, message)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            function(*arguments)
        except Exception as error:
            log.error("an order of fleet-worker up could not be obeyed (%s)", type(error).__name__)
