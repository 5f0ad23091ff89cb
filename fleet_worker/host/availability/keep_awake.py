"""Keeps this machine from sleeping while a node runs a request: a process of the system, which ends with this one."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability.held_process import UNTIL_INPUT_ENDS, HeldProcess
from fleet_worker.host.availability.probes import find_program
from fleet_worker.host.child_process import how_ended
from fleet_worker.host.node_process import NEVER

log = logging.getLogger(__name__)

LINGER = 30.0
"""Seconds without a request after which the machine may sleep, so that not every request starts a process."""


def command() -> list[str]:
    """Return the command that keeps this machine awake while the command after it runs."""
    if sys.platform == "darwin":
        return ["caffeinate", "-i", "-s"]
    why = "--why=it runs requests of the fleet"
    return ["systemd-inhibit", "--what=idle:sleep", "--who=fleet-worker", why, "--mode=block"]


class KeepAwake:
    """At most one process of `caffeinate` or `systemd-inhibit`. No method but `close` waits: call `act` at the time
    `due`. If the system refuses it, that is said once, and not tried again.
    """

    def __init__(
        self, settings: AvailabilitySettings, *, linger: float = LINGER, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._wanted = settings.in_use and settings.keep_awake
        self._linger = linger
        self._clock = clock
        self._process: HeldProcess | None = None
        self._released: list[HeldProcess] = []
        """Those that have not ended yet."""
        self._ends_at = NEVER

    @property
    def due(self) -> float:
        """The time.monotonic() at which `act` has something to do."""
        return self._ends_at

    def working(self, running: int) -> None:
        """Tell it how many requests run on this host."""
        if not self._wanted:
            return
        self._reap()
        if not running:
            if self._process and self._ends_at == NEVER:
                self._ends_at = self._clock() + self._linger
            return
        self._ends_at = NEVER
        if not self._process:
            self._start()

    def act(self) -> None:
        """Let the machine sleep, if nothing has run for a while."""
        self._reap()
        if self._clock() >= self._ends_at:
            self._release()

    def close(self) -> None:
        """End its process, within two seconds."""
        self._release()
        for process in self._released:
            process.end()
        self._released = []

    def _start(self) -> None:
        words = command()
        program = find_program(words[0])
        if not program:
            self._give_up(f"{words[0]} is not there")
            return
        try:
            self._process = HeldProcess([program, *words[1:], *UNTIL_INPUT_ENDS])
        except OSError as error:
            self._give_up(str(error.strerror))

    def _reap(self) -> None:
        self._released = [process for process in self._released if process.poll() is None]
        if self._process and (code := self._process.poll()) is not None:
            self._release()
            self._give_up(f"{command()[0]} {how_ended(code)}")

    def _release(self) -> None:
        self._ends_at = NEVER
        if self._process:
            self._process.release()
            self._released.append(self._process)
            self._process = None

    def _give_up(self, why: str) -> None:
        log.info("this machine may go to sleep while it runs requests: %s", why)
        self._wanted = False
