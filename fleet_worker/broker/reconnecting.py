"""A connection to the broker that a thread of its own keeps, and makes again whenever it breaks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kombu import Connection

from fleet_worker.broker.connection import BACK_OFF, HEARTBEAT, hang_up

log = logging.getLogger(__name__)


class ReconnectingThread:
    """`use` works with a connection until the link is closed; whatever it raises is answered with another connection.

    Nobody waits for it: a broker that is away, slow or frozen only makes it late. `name` says in the log what is cut
    off, if it had worked before. `failed` is called with each error.
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
        self._worked = False
        self.closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"fleet-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def works(self) -> None:
        """For `use` to say, once its connection serves."""
        if self._failures and self._worked:
            log.warning("%s: the broker is back", self._name)
        self._failures, self._worked = 0, True

    def close(self, timeout: float = 0.0) -> None:
        """End soon; wait for it for so many seconds."""
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
                if self._worked and not self._failures and not self.closed.is_set():
                    log.warning("%s: the broker is away (%s)", self._name, type(error).__name__)
                self.closed.wait(BACK_OFF[min(self._failures, len(BACK_OFF) - 1)])
                self._failures += 1
