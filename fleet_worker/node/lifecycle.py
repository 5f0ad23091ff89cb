"""The life of a node's process: started, the only one of its name, reloaded by SIGHUP, ended by SIGTERM."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.worker import state as celery_state

from fleet_worker import exit_codes
from fleet_worker.errors import ConfigurationError
from fleet_worker.registry.node import RegistryNode
from fleet_worker.settings import Settings

if TYPE_CHECKING:
    from fleet_worker.node.node import Node

log = logging.getLogger(__name__)

HANDED_OVER_WITHIN = 3.0
"""Seconds in which the requests that still run after the grace have to end."""
HAND_OVER_EVERY = 0.1
"""Seconds until requests that have begun meanwhile are handed over too."""
LEAVE_AFTER = 8.0
"""Seconds that Celery gets to close its connections when a stopping node has no more work. Together with the seconds
above, and one to close without Celery, less than the 15 of `WorkerSettings.killed_after`."""


class Startup:
    """Handles signals until `Lifecycle` does. Nothing runs yet, so ending is easy.

    `can_follow` returns whether the node can follow new settings once it is ready. Create it in the main thread. Its
    handlers only start a thread: in the main thread the line that is just being logged could swallow what they raise.
    """

    def __init__(self, node_name: str, can_follow: Callable[[Settings], bool]) -> None:
        self._name = node_name
        self._can_follow = can_follow
        self.reloads = False
        """Whether there are newer settings, which the node has to follow when it is ready."""
        signal.signal(signal.SIGTERM, lambda *_: _in_thread(lambda: self._end(0)))
        signal.signal(signal.SIGINT, lambda *_: _in_thread(lambda: self._end(exit_codes.INTERRUPTED)))
        signal.signal(signal.SIGHUP, lambda *_: _in_thread(self._reload))

    def _end(self, exit_code: int) -> None:
        log.info("%s ends before it was ready", self._name)
        end_process(exit_code)

    def _reload(self) -> None:
        """End if the new settings need a new process: this one may be waiting for a server at a wrong address."""
        try:
            can_follow = self._can_follow(_read_settings())
        except ConfigurationError as error:
            log.error("%s keeps its old configuration: %s", self._name, error.message)
            return
        if not can_follow:
            log.warning("%s ends: its new configuration needs a new process", self._name)
            end_process(exit_codes.RESTART)
        self.reloads = True
        log.info("%s follows the new configuration when it is ready", self._name)


class Lifecycle:
    """The life of one Celery worker that is a node. `grace` is the seconds that running requests get at its end."""

    def __init__(self, worker: Any, node: Node | RegistryNode, *, grace: float) -> None:
        self._worker = worker
        self._node = node
        self._grace = grace
        self._ended = threading.Event()
        self._is_ready = False
        self._reloads = False
        self._startup: Startup | None = None
        self._reloading = threading.Lock()
        self._exit_code: int | None = None

    def begin(self, startup: Startup) -> None:
        """Handle signals from now on, in place of `startup`."""
        signals.worker_ready.connect(self._on_ready, weak=False)
        signals.worker_shutting_down.connect(self._on_interrupt, weak=False)
        signals.worker_shutdown.connect(self._on_shutdown, weak=False)
        signal.signal(signal.SIGHUP, lambda *_: self._on_hangup())
        self._startup = startup
        signal.signal(signal.SIGTERM, lambda *_: self._end(0, asked=True))

    def name_is_taken(self) -> None:
        """End: another process has the name of this node."""
        self._end(exit_codes.CONFIGURATION)

    def restart(self) -> None:
        """End, so that `fleet-worker up` starts this node again."""
        self._end(exit_codes.RESTART)

    def _on_ready(self, **_: Any) -> None:
        _collect_garbage_often()
        self._node.start()
        self._is_ready = True
        if self._reloads or (self._startup and self._startup.reloads):  # it may still have been reading them in `begin`
            _in_thread(self._reload)

    def _on_hangup(self) -> None:
        """SIGHUP: read the configuration again, now or when the node is ready."""
        if self._is_ready:
            _in_thread(self._reload)
        else:
            self._reloads = True

    def _on_interrupt(self, sender: str, exitcode: int, **_: Any) -> None:
        """Ctrl-C, which Celery handles."""
        if sender == self._node.name:
            self._end(exitcode, asked=True)

    def _on_shutdown(self, sender: Any, **_: Any) -> None:
        """Celery has ended: no task runs any more."""
        if sender is self._worker:
            self._node.close()
            self._ended.set()
            log.info("%s ended", self._node.name)

    def _reload(self) -> None:
        """Follow the configuration without touching running requests, or end if that needs a new process."""
        name = self._node.name
        try:
            with self._reloading:  # so that of two reloads the one with the newer settings is the last
                followed = self._node.reload(_read_settings())
        except ConfigurationError as error:
            log.error("%s keeps its old configuration: %s", name, error.message)
            return
        if followed:
            log.info("%s follows the new configuration", name)
        else:
            log.warning("%s ends: its new configuration needs a new process", name)
            self._end(exit_codes.RESTART)

    def _end(self, exit_code: int, *, asked: bool = False) -> None:
        """Leave. If a signal asked for it, the last signal sets the exit code; else the first reason does.

        Called by signal handlers, which must not wait for a lock.
        """
        leaving = self._exit_code is not None
        if asked or not leaving:
            self._exit_code = exit_code
        if not leaving:
            _in_thread(self._leave)

    def _leave(self) -> None:
        """Let running requests end, or hand them over; then exit, even if the broker is frozen: Celery would wait for
        it without a limit.

        Celery's event loop keeps running until all tasks are done: its own warm shutdown would lose messages that were
        delivered but not started.
        """
        log.info("%s ends, running requests have %g s", self._node.name, self._grace)
        if not isinstance(self._node, RegistryNode):
            self._end_requests(self._node)
        celery_state.should_stop = self._exit_code  # Celery checks it in each turn of its event loop
        if consumer := getattr(self._worker, "consumer", None):
            consumer.call_soon(lambda: None)  # wakes the loop: it may wait for seconds
        if not self._ended.wait(LEAVE_AFTER):
            log.warning("%s leaves: its work is done, and the broker does not answer", self._node.name)
            self._node.close(timeout=1.0)
            end_process(self._exit_code or 0)

    def _end_requests(self, node: Node) -> None:
        node.drain(ending=True)
        idle = node.wait_until_idle(self._grace)
        ends = time.monotonic() + HANDED_OVER_WITHIN
        while not idle and time.monotonic() < ends:
            node.hand_over()
            idle = node.wait_until_idle(HAND_OVER_EVERY)


def _collect_garbage_often() -> None:
    """Leave out of garbage collections what is in memory now: it stays until the end.

    Python collects in full when the new objects are a quarter of the old ones. Of each failed task Celery leaves 100 kB
    in cycles, so a node grew by 60 MB before (measured); and a full collection takes a tenth of the time now.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # from now on the old ones are none


def _read_settings() -> Settings:
    settings = Settings()
    settings.serving()
    return settings


def end_process(exit_code: int) -> None:
    """End the process from any thread, without what Python and Celery do at their end."""
    logging.shutdown()
    os._exit(exit_code)


def _in_thread(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()
