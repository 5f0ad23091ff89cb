"""A connection to the broker that a thread of its own keeps, and opens again whenever it breaks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kombu import Connection

from fleet_worker.broker.connection import BACK_OFF, HEARTBEAT, hang_up, outage

log = logging.getLogger(__name__)


class ReconnectingThread:
    """Calls `use` with a connection until it is closed; after each exception, `failed` with it, and `use` with a new
    connection.

    Nobody waits for this thread: a broker that is away, slow or frozen only delays it. `name` tells in the log what
    was interrupted, if it had worked before.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Connection],
        use: Callable[[Connection], None],
        failed: Callable[[Exception], object] = lambda error: None,
    ) -> None:
        self._name = name
        self._connect = connect
        self._use = use
        self._failed = failed
        self._failures = 0
        self.worked = threading.Event()
        """Set when a connection has worked for the first time."""
        self.closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"fleet-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def works(self) -> None:
        """To be called by `use` when its connection has proved to work."""
        if self._failures and self.worked.is_set():
            log.warning("%s: the broker is back", self._name)
        self._failures = 0
        self.worked.set()

    def close(self, timeout: float = 0.0) -> None:
        """Ask the thread to end, and wait for it at most `timeout` seconds."""
        self.closed.set()
        if timeout and self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self.closed.is_set():
            connection = self._connect()
            connection.heartbeat = HEARTBEAT
            try:
                self._use(connection)
                connection.close()
            except Exception as error:
                hang_up(connection)
                self._failed(error)
                if self.worked.is_set() and not self._failures and not self.closed.is_set():
                    log.warning("%s: the broker %s", self._name, outage(error))
                self.closed.wait(BACK_OFF[min(self._failures, len(BACK_OFF) - 1)])
                self._failures += 1
