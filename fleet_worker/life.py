"""The life of a worker process after its start: alone of its name, reloaded by SIGHUP, ended warmly."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import celery.apps.worker as celery_worker
from celery import signals
from celery.worker import state as celery_state

from fleet_worker import exit_codes
from fleet_worker.errors import ConfigurationError
from fleet_worker.node import Node
from fleet_worker.registry_node import RegistryNode
from fleet_worker.settings import Settings

__all__ = ["Life"]

log = logging.getLogger(__name__)

LEAVE_AFTER = 15.0
"""Seconds that Celery gets to say goodbye to the broker once a stopping node has no more work."""


class Life:
    """Of one Celery worker, told by Celery's signals."""

    def __init__(self, worker: Any, node: Node | RegistryNode) -> None:
        self._worker = worker
        self._node = node
        self._ended = threading.Event()
        self._is_ready = False
        self._reloads = False

    def begin(self) -> None:
        signals.worker_ready.connect(self._ready, weak=False)
        signals.worker_shutting_down.connect(self._stopping, weak=False)
        signals.worker_shutdown.connect(self._stopped, weak=False)
        celery_worker.install_worker_restart_handler = lambda worker: None  # it would start the process anew
        signal.signal(signal.SIGHUP, lambda *_: self._hang_up())

    def _ready(self, **_: Any) -> None:
        self._node.start()
        _in_thread(self._leave_if_not_alone)
        self._is_ready = True
        if self._reloads:
            _in_thread(self._reload)

    def _hang_up(self) -> None:
        """SIGHUP: read the configuration again, now or as soon as there is somebody to follow it."""
        if self._is_ready:
            _in_thread(self._reload)
        else:
            self._reloads = True

    def _leave_if_not_alone(self) -> None:
        """Two nodes of one name would be one to everybody else. Celery only warns, and not here."""
        name = self._node.name
        try:
            answers = self._worker.app.control.ping(destination=[name], limit=2, timeout=2.0)
        except Exception as error:
            log.warning("whether there is another %s could not be asked (%s)", name, type(error).__name__)
        else:
            if len(answers) > 1:
                log.critical("another node is named %s: give the instance, or the host, a name of its own", name)
                self._end(exit_codes.CONFIGURATION)

    def _reload(self) -> None:
        """Follow the configuration, without touching what is running."""
        name = self._node.name
        try:
            settings = Settings()
            settings.serving()
        except ConfigurationError as error:
            log.error("%s keeps its old configuration: %s", name, error.message)
            return
        if self._node.reload(settings):
            log.info("%s follows the new configuration", name)
        else:
            log.warning("%s ends: its new configuration needs a new process", name)
            self._end(exit_codes.AGAIN)

    def _end(self, exit_code: int) -> None:
        """As by SIGTERM, but with this exit code: Celery looks at it between two turns of its event loop."""
        self._stopping(sender=self._node.name)
        celery_state.should_stop = exit_code

    def _stopping(self, sender: str, **_: Any) -> None:
        if sender == self._node.name:  # in a signal handler, where no lock may be waited for
            _in_thread(self._leave)

    def _stopped(self, sender: Any, **_: Any) -> None:
        """All tasks have ended by now."""
        if sender is self._worker:
            self._node.close()
            self._ended.set()
            log.info("%s ended", self._node.name)

    def _leave(self) -> None:
        """Exit when the work is done, even if the broker is frozen: Celery would wait for it without an end."""
        self._node.drain()
        self._node.wait_until_idle()
        if not self._ended.wait(LEAVE_AFTER):
            log.warning("%s leaves: its work is done, and the broker does not answer", self._node.name)
            self._node.close(timeout=1.0)
            logging.shutdown()
            os._exit(0)


def _in_thread(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()
