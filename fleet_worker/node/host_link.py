"""The node's end of its host's `fleet-worker up`: tells what the node does and what ails its server, and obeys orders.

Without an `up` nothing here has an effect.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fleet_worker.host.up_socket import UpLink
from fleet_worker.protocol.host_messages import FromUp, NodeNews, Pause, Resume
from fleet_worker.protocol.status import Status

NEWS_APART = 0.1
"""Seconds between two messages at least."""
LONGEST_WAIT = 60.0
"""Seconds without any change after which the thread looks nevertheless."""
STATUS: dict[str, Status] = {"away": "away", "restarting": "starting"}
"""What a node is shown as, by the status of a pause."""


class Obeying(Protocol):
    """What orders ask of a node, and news tell of it."""

    name: str

    @property
    def running(self) -> Sized: ...
    @property
    def fault(self) -> str: ...
    def pause(self, status: Status, reason: str) -> None: ...
    def resume(self) -> None: ...
    def hand_over(self, reason: str, *, after_fault: bool) -> None: ...
    def wait_until_idle(self, timeout: float) -> bool: ...


@dataclass(slots=True)
class _Standing:
    """A pause that has not ended."""

    reason: str
    ends_at: float
    """When its grace does: time.monotonic() seconds."""
    after_fault: bool
    """The node had found a fault of its server: what runs may be the cause."""
    is_closed: bool = False
    """What still ran was handed over, and so is what begins from now on."""
    is_complete: bool = False
    """Since then nothing runs any more."""


class HostLink:
    """One thread, beside that of the connection. A pause is complete when all requests have ended or were handed over:
    after its grace, or at once if the server has a fault, since none would end then."""

    def __init__(self, node: Obeying, path: Path) -> None:
        self._node = node
        self._link = UpLink(path, self._obey)
        self._lock = threading.Lock()
        """Held while an order is carried out, so that nothing of a pause happens after its end."""
        self._standing: _Standing | None = None
        self._order = 0
        self._told: NodeNews | None = None
        self._ordered = threading.Event()
        """Set by the first order."""
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet-host-link", daemon=True)

    def start(self) -> None:
        self._changed.set()
        self._link.start()
        self._thread.start()

    def wait_for_order(self, timeout: float) -> None:
        """Return when the first order was carried out, or after so many seconds."""
        self._ordered.wait(timeout)

    def changed(self) -> None:
        """Tell `up` soon what the node does now: it has begun or ended work, or found a fault."""
        self._changed.set()

    def close(self) -> None:
        """Disconnect soon; only once."""
        self._closed.set()
        self._changed.set()
        self._link.close()

    def _obey(self, message: FromUp) -> None:
        with self._lock:
            if isinstance(message, Pause):
                self._pause(message)
            elif isinstance(message, Resume):
                self._standing, self._order = None, message.order
                self._node.resume()
        self._ordered.set()
        self._changed.set()

    def _pause(self, pause: Pause) -> None:
        """One that stands goes on with another status and reason, and with the shorter grace."""
        has_fault = bool(self._node.fault)
        ends_at = time.monotonic() + (0.0 if has_fault else pause.grace)
        if self._standing is None:
            self._standing = _Standing(pause.reason, ends_at, has_fault)
        self._standing.reason, self._standing.ends_at = pause.reason, min(ends_at, self._standing.ends_at)
        self._order = pause.order
        self._node.pause(STATUS[pause.status], pause.reason)

    def _run(self) -> None:
        while not self._closed.is_set():
            if self._standing and not self._standing.is_complete:
                self._complete(idle=self._node.wait_until_idle(NEWS_APART))
            else:
                self._changed.wait(LONGEST_WAIT)
            self._changed.clear()
            if self._tell():
                self._closed.wait(NEWS_APART)

    def _complete(self, *, idle: bool) -> None:
        """Go one step further with the pause that stands, if one does."""
        with self._lock:
            if (standing := self._standing) is None:
                return
            if standing.is_closed:
                standing.is_complete = idle
            elif idle or time.monotonic() >= standing.ends_at:
                reason = f"the node takes no work: {standing.reason}"
                self._node.hand_over(reason, after_fault=standing.after_fault)
                standing.is_closed = True

    def _tell(self) -> bool:
        """Return whether there was anything new."""
        with self._lock:
            running, standing = len(self._node.running), self._standing
            is_idle = standing is not None and standing.is_complete
            news = NodeNews(self._node.name, running, is_idle, self._node.fault, self._order)
        is_new = news != self._told
        if is_new:
            self._told = news
            self._link.send(news)
        return is_new
