"""A worker process that is no node yet: it may have to wait for its MLX server, or for the node before it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import NoReturn

from fleet_worker import exit_codes
from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings

__all__ = ["Startup"]

log = logging.getLogger(__name__)


class Startup:
    """Handles signals until the `Life` of a node does: to end is easy, for nothing runs.

    `follows` tells whether the node can follow a new configuration once it is ready. For the main thread, whose waits
    end by an exception of a signal handler.
    """

    def __init__(self, node_name: str, follows: Callable[[Settings], bool]) -> None:
        self._name = node_name
        self._follows = follows
        self.reloads = False
        """Whether there is a newer configuration, which the node has to follow when it is ready."""
        signal.signal(signal.SIGTERM, lambda *_: self._end(0))
        signal.signal(signal.SIGINT, lambda *_: self._end(exit_codes.INTERRUPTED))
        signal.signal(signal.SIGHUP, lambda *_: self._hang_up())

    def _end(self, exit_code: int) -> NoReturn:
        log.info("%s ends before it was ready", self._name)
        raise SystemExit(exit_code)

    def _hang_up(self) -> None:
        """It may wait for a server whose address has just been corrected: then only a new process helps."""
        try:
            settings = Settings()
            settings.serving()
        except ConfigurationError as error:
            log.error("%s keeps its old configuration: %s", self._name, error.message)
            return
        if not self._follows(settings):
            log.warning("%s ends: its new configuration needs a new process", self._name)
            raise SystemExit(exit_codes.AGAIN)
        log.info("%s follows the new configuration when it is ready", self._name)
        self.reloads = True
