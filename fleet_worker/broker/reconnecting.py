"""A connection to the broker that a thread of its own keeps, and opens again whenever it breaks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kombu import Connection

from fleet_worker.broker.connection import HEARTBEAT, hang_up
from fleet_worker.broker.outage import Outage

log = logging.getLogger(__name__)


class ReconnectingThread:
    """Calls `use` with a connection until it is closed; after each exception, `failed` with it, and `use` with a new
    connection.

    Nobody waits for this thread: a broker that is away, slow or frozen only delays it. `name` tells in the log what is
    refused, or what was interrupted if it had worked before and is not `is_quiet`.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Connection],
        use: Callable[[Connection], None],
        failed: Callable[[Exception], object] = lambda error: None,
        *,
        is_quiet: bool = False,
    ) -> None:
        self._connect = connect
        self._use = use
        self._failed = failed
        self.worked = threading.Event()
        """Set when a connection has worked for the first time."""
        self.closed = threading.Event()
        self._outage = Outage(
            f"{name}: the broker", log, is_quiet=lambda: is_quiet or not self.worked.is_set() or self.closed.is_set()
        )
        self._thread = threading.Thread(target=self._run, name=f"fleet-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def works(self) -> None:
        """To be called by `use` whenever its connection has proved to work, about once a second."""
        self._outage.works()
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
                self.closed.wait(self._outage.failed(error))
