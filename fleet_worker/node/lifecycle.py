"""The life of a worker process after its start: alone of its name, reloaded by SIGHUP, ended warmly."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NoReturn

from celery import bootsteps, signals
from celery.worker import state as celery_state
from celery.worker.control import inspect_command

from fleet_worker import exit_codes
from fleet_worker.errors import ConfigurationError
from fleet_worker.node.node import Node
from fleet_worker.registry.node import RegistryNode
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

BROKEN_CONNECTION = (AttributeError, ValueError)
"""What Celery and py-amqp also raise when a connection breaks while it is set up: its socket is None, or closed."""
WHO_ANSWERS_WITHIN = 2.0
"""Seconds in which every process of a name has to say which one it is."""
ASKED_WHO = 5
"""Times that this is asked, until this process hears itself: its first question may come before Celery listens."""
HANDED_OVER_WITHIN = 3.0
"""Seconds in which what is still running after its grace has to let go."""
HAND_OVER_EVERY = 0.1
"""Seconds between two looks at what that is: what was taken a moment ago is only beginning."""
LEAVE_AFTER = 8.0
"""Seconds that Celery gets to say goodbye to the broker once a stopping node has no more work. Together with the
above, and with the last words of a node that leaves without it, less than the 15 of `Worker.killed_after`."""


class Reconnecting(bootsteps.Step):  # type: ignore[misc]
    """A connection that breaks while Celery sets it up costs another connection, and not the worker."""

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        consumer.connection_errors = (*consumer.connection_errors, *BROKEN_CONNECTION)


class Lifecycle:
    """Of one Celery worker, told by Celery's signals."""

    def __init__(self, worker: Any, node: Node | RegistryNode, *, grace: float) -> None:
        self._worker = worker
        self._node = node
        self._grace = grace
        self._process, self._began = uuid.uuid4().hex, time.monotonic()
        self._ended = threading.Event()
        self._is_ready = False
        self._reloads = False
        self._reloading = threading.Lock()
        self._exit_code: int | None = None

    def begin(self, startup: Startup) -> None:
        """Take over from what handled signals until now."""
        signals.worker_ready.connect(self._ready, weak=False)
        signals.worker_shutting_down.connect(self._stopping, weak=False)
        signals.worker_shutdown.connect(self._stopped, weak=False)
        signal.signal(signal.SIGHUP, lambda *_: self._hang_up())
        self._reloads |= startup.reloads
        signal.signal(signal.SIGTERM, lambda *_: self._end(0, asked=True))

        @inspect_command(visible=False)  # type: ignore[untyped-decorator]
        def process(state: Any, **_: Any) -> list[Any]:
            """Which one of this name this is, and its age in seconds."""
            return [self._process, self._age()]

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
        """Two nodes of one name would be one to everybody else, and Celery only warns. The elder one stays."""
        name = self._node.name
        for _ in range(ASKED_WHO):
            age = self._age()
            try:
                ages = self._ages()
            except Exception as error:
                log.warning("whether there is another %s could not be asked (%s)", name, type(error).__name__)
                break
            is_heard = ages.pop(self._process, None) is not None
            if max(ages.values(), default=0.0) > age:
                log.critical("another node is named %s: give the instance, or the host, a name of its own", name)
                self._end(exit_codes.CONFIGURATION)
            if ages or is_heard:
                break

    def _ages(self) -> dict[str, float]:
        """How old the processes of this name are that answer."""
        name = self._node.name
        said = self._worker.app.control.broadcast(
            "process", destination=[name], reply=True, limit=2, timeout=WHO_ANSWERS_WITHIN
        )
        return dict(answer[name] for answer in said or ())

    def _age(self) -> float:
        return time.monotonic() - self._began

    def _reload(self) -> None:
        """Follow the configuration, without touching what is running."""
        name = self._node.name
        try:
            with self._reloading:  # who reads last follows last
                settings = Settings()
                settings.serving()
                followed = self._node.reload(settings)
        except ConfigurationError as error:
            log.error("%s keeps its old configuration: %s", name, error.message)
            return
        if followed:
            log.info("%s follows the new configuration", name)
        else:
            log.warning("%s ends: its new configuration needs a new process", name)
            self._end(exit_codes.AGAIN)

    def _stopping(self, sender: str, exitcode: int, **_: Any) -> None:
        """Celery's own handlers tell: that of Ctrl-C."""
        if sender == self._node.name:
            self._end(exitcode, asked=True)

    def _end(self, exit_code: int, *, asked: bool = False) -> None:
        """Leave. Who asks for it says with which exit code; a reason of its own counts only if it is the first.

        Called by signal handlers, where no lock may be waited for.
        """
        leaving = self._exit_code is not None
        if asked or not leaving:
            self._exit_code = exit_code
        if not leaving:
            _in_thread(self._leave)

    def _stopped(self, sender: Any, **_: Any) -> None:
        """All tasks have ended by now."""
        if sender is self._worker:
            self._node.close()
            self._ended.set()
            log.info("%s ended", self._node.name)

    def _leave(self) -> None:
        """Let running work end, or hand it over; then exit, even if the broker is frozen: Celery would wait for it
        without an end.

        Celery goes on until there is no more work. It would take nothing more, but forget what it has just taken.
        """
        log.info("%s ends, running requests have %g s", self._node.name, self._grace)
        self._node.drain(ending=True)
        if not self._node.wait_until_idle(self._grace):
            self._hand_over()
        celery_state.should_stop = self._exit_code  # Celery looks at it between two turns of its event loop
        if not self._ended.wait(LEAVE_AFTER):
            log.warning("%s leaves: its work is done, and the broker does not answer", self._node.name)
            self._node.close(timeout=1.0)
            logging.shutdown()
            os._exit(self._exit_code or 0)

    def _hand_over(self) -> None:
        ends = time.monotonic() + HANDED_OVER_WITHIN
        while time.monotonic() < ends:
            self._node.hand_over()
            if self._node.wait_until_idle(HAND_OVER_EVERY):
                return


def _in_thread(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()


class Startup:
    """Handles signals until the `Lifecycle` of a node does: to end is easy, for nothing runs.

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
